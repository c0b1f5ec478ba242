"""Evaluation of trained models, and validation during training.

evaluate.py                all metrics of a model, into evaluation.json and report.html
compare.py                 two models on the same captions and noise, with paired tests
sections.py                the sections of an evaluation
evaluated_model.py         a pipeline under evaluation: its networks, generation, timing
evaluation_set.py          the real pictures of a data set, and the prompt sets
features.py                feature extractors: pixels, a frozen network, the in-domain CLIP
in_domain_clip.py          the in-domain CLIP
in_domain_clip_training.py its training
caption_suggestions.py     captions that it finds nearest to a picture without one
ema_width.py               the choice of the average's width
upscaling.py               an upscaler against resampling
sweep.py                   the choice of guidance scale, interval and number of steps
validation.py              validation losses of a training run at fixed (sample, t, eps)
provenance.py              the machine, and the record of the run that made a model
metrics/                   FID, KID, retrieval, likelihood, memorization, with confidence intervals
report/                    report.html and the summary in the terminal
"""
