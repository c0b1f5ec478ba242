"""Sharing: models with their cards, pictures with their settings.

export.py        a folder of half the size
hub.py           the folder of a shared model, and its upload to the Hub
model_card.py    the model card and its metrics
redaction.py     removes this machine's paths from shared files
png_metadata.py  settings inside the picture
"""
