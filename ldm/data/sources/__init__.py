"""Where captioned pictures come from: rows and problems, the same from each.

opening.py    which kind of source a name is
folders.py    pictures with metadata, or with a .txt beside each
tables.py     metadata files: csv, jsonl, parquet
rewriting.py  the same with some rows changed
shards.py     WebDataset tar files
hub.py        Hugging Face data sets
"""
