"""The networks: stock diffusers and transformers classes, built from short configs or loaded.

vae.py    pixels  => latents => pixels
text.py   caption => context
unet.py   x_t, t, context => prediction
conditioning.py   what the U-Net is told besides x_t and t
ema.py    a slow average of the U-Net's weights
classifier.py     x_t, t => class
discriminator.py  the judge of the VAE's optional adversarial loss
loading.py        a folder => the network in it, with every weight
trust.py          a stranger's folder => one that holds data and nothing that runs
fingerprint.py    what a network computes, in 32 hex digits
"""
