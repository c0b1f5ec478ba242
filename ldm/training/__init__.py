"""The training loop and what keeps it safe.

config.py      one frozen dataclass = one YAML file = the command line
draws.py       every random number of training, as a function of (seed, sample)
loop.py        one step, one loop
vae_loop.py    the same for the autoencoder
checkpoint.py  atomic save, resume
tracking.py    scalars, sample grids, loss by timestep
"""
