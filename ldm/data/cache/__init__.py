"""Latents and contexts, encoded once and kept on disk.

latents.py  posteriors of pictures, contexts of captions
store.py    records on disk, found by key
writer.py   building and repairing a store
"""
