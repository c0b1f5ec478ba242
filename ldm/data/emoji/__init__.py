"""The embedded data set.

openmoji.py  OpenMoji's drawings into a captioned folder
"""
