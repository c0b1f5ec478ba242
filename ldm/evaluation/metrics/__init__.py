"""The metrics.

distribution.py  FID, KID, precision and recall, density and coverage
intervals.py     estimates with confidence intervals
memorization.py  near-copies of training pictures
nll.py            a bound on the negative log-likelihood of latents
seeds.py         several seeds of a prompt: reliability and coverage
retrieval.py     whether the real picture of a prompt is the nearest to the generated one
"""
