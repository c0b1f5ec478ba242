"""The training loop, its tasks, and what keeps a run safe.

config.py          one frozen dataclass = one YAML file
run.py             train("vae" | "ldm" | "distill" | "classifier", config)
trainer.py         one step, and the loop around it
task.py            what a kind of training is
sizes.py           data.size fits everything that halves it
optimizer.py       the learning rate, skipped steps
optimizers.py      AdamW, Muon, schedule-free, 8-bit AdamW by name
objective.py       the diffusion section of the config => process, timesteps, loss
initial_model.py   the model that init names: what it brings, its U-Net at step 0
order.py           which picture sample n shows
samples.py         (seed, sample) => the tensors of a batch of the U-Net's
randomness.py      every random number of training, as a function of (seed, sample)
prior.py           samples of a LoRA that keep what the model does
trigger.py         the words that call what a LoRA has learned
masks.py           what an inpainting model learns to fill in
upscale_config.py  the upscale section of the config
upscaling.py       what an upscaler learns from: crops and noised small pictures
small_pictures.py  small pictures, and what the base model makes of them
encoders.py        VAE and text encoder, each in memory only while it encodes
encoder_sources.py where they come from
normalization.py   latents and contexts of unit variance: measured once, folded into the encoders
text_adapters.py   a text encoder that learns: batches of tokens
encoder_report.py  how much the VAE blurs, how many captions are cut
latent_cache.py    the cache of a run
budget.py          loop.minutes: a recipe scaled to a time
monitor.py         skipped steps, spikes of the loss, signals
train_state.py     networks, optimizers and averages as plain tensors
checkpoint.py      atomic save, verified load
ema_snapshots.py   snapshots of averages, in step with the checkpoints
resume.py          from the newest checkpoint; which config keys may change
facts.py           what a run has found out, remembered for its next start
export.py          RUN/pipeline, RUN/lora, RUN/vae, RUN/classifier: verified before they replace the last
previews.py        what a run generates on the way
logging.py         scalars and pictures
signals.py         SIGTERM, SIGINT, SIGUSR1
distributed.py     devices, ranks, and a lost rank
rendezvous.py      processes that torchrun started again
tasks/             autoencoder, diffusion, lora, upscaling, classifier
doctor/            before hours are spent: can it learn here?
"""
