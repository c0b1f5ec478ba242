"""How good the model is.

heldout.py   the loss on held-out pictures at fixed (t, eps), by quarter of t
accuracy.py  of a classifier of noisy latents, likewise
nll.py       the bound on the likelihood of held-out latents, by t
"""
