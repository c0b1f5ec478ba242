"""The training loop and what keeps it safe.

config.py         one frozen dataclass = one YAML file
command_line.py   what people type => the config (plain_yaml.py: the part of YAML that it knows)
bounds.py         what a number of the config may be
objective.py      its diffusion section => process, timesteps, loss
device.py         what the device can do
heap.py           memory that a CPU frees and needs again (resident.py: the most that was held)
latents.py        a VAE whose latents have unit variance, checked
context.py        a text encoder whose context has, too; captions it can't take whole
scales.py         what both are measured to be, once in a run
draws.py          every random number of training, as a function of (seed, sample)
encoders.py       VAE and text encoder, each in memory only while it encodes
caching.py        the latent cache of a run
ranks.py          work that one process does for all
samples.py        (seed, sample) => the tensors of a batch
denoiser.py       the U-Net that a recipe asks for
doctor.py         before hours are spent: can it learn here? (needs.py: room; trial.py: a few steps; findings.py: told)
learning_rate.py  a function of the step
drawing.py        what a run draws of itself
loop.py           one step, one loop
plain_loop.py     the loop of those that draw nothing
vae_loop.py       the autoencoder's step
classifier_loop.py  the step of the classifier of noisy latents
checkpoint.py     atomic save, verified resume
trainee.py        what is trained, as plain tensors
disk.py           folders that are whole or absent
changes.py        which config keys may change on resume
signals.py        SIGTERM, SIGINT, SIGUSR1
peers.py          a lost rank ends the others
health.py         numbers that are not numbers, losses that jump
export.py         RUN/pipeline
selfcheck.py      an exported pipeline is what was trained
tracking.py       scalars and pictures
"""
