"""What leaves this machine: models with their cards, pictures with their settings.

export.py        a folder of half the size
hub.py           the folder that goes to the Hub
model_card.py    its card
figures.py       the card's figures
redaction.py     paths leave what is shared
png_metadata.py  settings inside the picture
"""
