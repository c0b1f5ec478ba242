"""Latents and contexts, encoded once and kept on disk.

latents.py  posteriors of pictures, contexts of captions
records.py  the record store
writer.py   adding to it
stamps.py   file stamps: which pictures are new
"""
