"""The training loop, its tasks, and what keeps it safe.

config.py         one frozen dataclass = one YAML file
objective.py      its diffusion section => process, timesteps, loss
run.py            train("vae" | "ldm" | "classifier", config)
trainer.py        one step, one loop
plain_loop.py     the loop of those that generate nothing
samples.py        (seed, sample) => the tensors of a batch
randomness.py     every random number of training, as a function of (seed, sample)
encoders.py       VAE and text encoder, each in memory only while it encodes
latents.py        a VAE whose latents have unit variance, checked
context.py        a text encoder whose context has, too
scales.py         what both are measured to be, once in a run
caching.py        the latent cache of a run
denoiser.py       the U-Net of a recipe
learning_rate.py  a function of the step
monitor.py        steps that are not finite, losses that jump
checkpoint.py     atomic save, verified resume
train_state.py    networks, optimizers and averages as plain tensors
resume.py         which config keys may change on resume
export.py         RUN/pipeline
selfcheck.py      an exported pipeline is what was trained
previews.py       what a run generates on the way
logging.py        scalars and pictures
signals.py        SIGTERM, SIGINT, SIGUSR1
distributed.py    devices, ranks, and a lost rank
tasks/            autoencoder, diffusion, classifier
doctor/           before hours are spent: can it learn here?
"""
