"""The page to generate pictures on.

page.py   a prompt, its pictures, and how long they took
"""
