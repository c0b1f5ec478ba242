"""The metrics.

accuracy.py      of a classifier of noisy latents
distribution.py  FID, KID, precision and recall, density and coverage
intervals.py     confidence intervals
memorization.py  near-copies of training pictures
nll.py           the bound on the negative log-likelihood
retrieval.py     is the real picture the nearest?
"""
