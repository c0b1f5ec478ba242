"""What people read of an evaluation.

page.py     report.html
charts.py   curves as SVG
curves.py   which curves there are
summary.py  the figures at the end of a command
"""
