"""Before hours are spent: can it learn here?

examine.py    the checks
findings.py   what they found
resources.py  disk and memory
trial.py      a few steps
"""
