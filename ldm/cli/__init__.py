"""The command line, a file for each command.

main.py      the parser, and what runs a command
config.py    what people type after a training's name => its config
sample.py    generate pictures
evaluate.py  measure a model
export.py    a folder of half the size
push.py      to the Hub
"""
