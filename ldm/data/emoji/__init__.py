"""The embedded data sets.

openmoji.py      OpenMoji's drawings into a captioned folder
compositions.py  nouns x colors x styles x people, with held-out combinations
variants.py      drawings in other colors, with other hair, as outlines
scenes.py        two drawings in a wide or tall picture
styles.py        other designers' emoji, from icon packages
"""
