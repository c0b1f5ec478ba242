"""The networks: stock diffusers and transformers classes, built from short configs or loaded.

vae.py    pixels  => latents => pixels
text.py   caption => context
unet.py   x_t, t, context => prediction
ema.py    a slow average of the U-Net's weights
fingerprint.py   what a network computes, in 32 hex digits
classifier.py  x_t, t => class
trust.py       a stranger's folder => one that holds data and nothing that runs
"""
