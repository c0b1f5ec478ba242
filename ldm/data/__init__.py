"""Captioned pictures in, tensors out.

captioned.py   any source => checked rows (folders.py, tables.py, shards.py, hub_sets.py, check.py, rows.py)
pictures.py    bytes => upright RGB => pixels
openmoji.py    the embedded data set
labels.py      classes from a column
conditioned.py pictures with all that a model may be told of them
cache.py       posteriors and contexts, computed once (records.py: the store; filling.py: adding to it; space.py:
               room for it; contents.py: which pictures are new)
duplicates.py  pictures that are there twice, in one split or in both
batches.py     some pictures of many, and their pixels
"""
