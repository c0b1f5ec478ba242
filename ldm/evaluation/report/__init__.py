"""The evaluation for people.

page.py        report.html
comparison.py  comparison.html
charts.py      the charts
text.py        numbers as text, and the summary and the sweep in the terminal
"""
