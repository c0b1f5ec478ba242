"""How good the model is.

heldout.py   the loss on held-out pictures at fixed (t, eps), by quarter of t
"""
