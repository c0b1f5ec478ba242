"""The training loop and what keeps it safe.

config.py         one frozen dataclass = one YAML file
command_line.py   what people type => the config
device.py         what the device can do
latents.py        a VAE whose latents have unit variance, checked
captions.py       captions the text encoder can't take whole
draws.py          every random number of training, as a function of (seed, sample)
encoders.py       VAE and text encoder, in memory only while they are needed
caching.py        the latent cache of a run
ranks.py          work that one process does for all
samples.py        (seed, sample) => the tensors of a batch
learning_rate.py  a function of the step
loop.py           one step, one loop
vae_loop.py       the same for the autoencoder
checkpoint.py     atomic save, resume
tracking.py       scalars and pictures
"""
