"""The page that `ldm app` serves.

page.py   what is on the page and what happens on it
jobs.py   generation in a thread, one at a time, that can be stopped
theme.py  colors, fonts, style
"""
