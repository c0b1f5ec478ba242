"""How good the model is: `ldm evaluate`.

evaluate.py     all metrics of a model, and one JSON file with them
examine.py      the sections of an evaluation
subject.py      a pipeline as the evaluation sees it
settings.py     how the evaluated pictures are generated
gallery.py      all real pictures of a data set
heldout.py      the validation loss at fixed (t, eps), by quarter of t
text_use.py     shuffled-caption gap and null-caption gap
features.py     feature spaces: pixels, a frozen network, the in-domain CLIP
contrastive.py  the in-domain CLIP
fit_net.py      fitting it
sweep.py        which guidance and how many steps
machine.py      speed, and the machine
run_record.py   what is known of the run that made a model
metrics/        FID, KID, retrieval, likelihood, memorization, with confidence intervals
report/         report.html and the summary
"""
