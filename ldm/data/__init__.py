"""Captioned pictures in, tensors out.

dataset.py      any source => checked rows
rows.py         what every source hands over: rows and problems
checks.py       rows as a source has them => rows to train on
facts.py        what is known of each picture file, remembered between starts
images.py       bytes => upright RGB => pixels
buckets.py      aspect ratios => a few sizes of one area
batches.py      rows => pixels, captions and batches of them
labels.py       classes from a column
numbers.py      numbers from columns
conditioned.py  pictures with all their conditions: captions, a class, a conditioning picture
duplicates.py   pictures that are there twice, in one split or in both
deduplication.py  the copies among them => a folder of their own
captioning.py   pictures without captions, and where new ones go
grid.py         pictures side by side, with captions
animation.py    pictures in a row: a strip, a GIF, a film
sources/        folders, tables, shards, the Hub
cache/          latents and contexts, encoded once
emoji/          the embedded data sets
"""
