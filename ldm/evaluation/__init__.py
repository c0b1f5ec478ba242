"""How good the model is: `ldm evaluate`.

what is asked
  heldout.py       the loss on held-out pictures at fixed (t, eps), by quarter of t
  text_use.py      what captions are worth to it: true, shuffled, none
  distribution.py  FID, KID, precision and recall, density and coverage, with their floor
  nll.py           the bound on the likelihood of held-out latents, by t
  accuracy.py      how often a classifier of noisy latents is right, by quarter of t
  retrieval.py     does it draw what was asked?
  memorization.py  does it draw, or copy?
  sweep.py         which guidance, how many steps
  machine.py       how long drawing takes, and where
what it is asked with
  features.py      the spaces in which pictures are compared
  contrastive.py   the data set's own judge; fit_net.py fits it
  gallery.py       all real pictures, and the captions that are asked
  subject.py       the pipeline that is examined, and what it drew; settings.py says how
what is said
  examine.py       the sections, one function each
  evaluate.py      all of them, in one JSON file
  intervals.py     a figure with its uncertainty
  summary.py       the same for people
  report.py        and to look at, in one HTML file; report_charts.py and charts.py draw its curves
  run_record.py    what is known of the run that made the model
"""
