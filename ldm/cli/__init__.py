"""The command line, a file for each command.

main.py      all commands
parser.py    what their parsers share
config.py    what people type after a training's name => its config
recipes.py   recipes by name
find.py      models by name, by hash, or where they usually are
lora.py      --lora
data.py      make and check data sets
caption.py   captions for pictures that have none
dedupe.py    pictures that are there twice
doctor.py    can this recipe train here?
train.py     train, or resume
sample.py    generate pictures
edit.py      change a picture
upscale.py   make pictures larger
walk.py      pictures between two prompts or seeds
evaluate.py  measure a model
compare.py   two models or settings on the same captions and noise
export.py    a folder of half the size
push.py      to the Hub
app.py       the page
"""
