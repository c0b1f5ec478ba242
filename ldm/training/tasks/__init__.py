"""The kinds of training, each with its data, networks, loss, validation and export.

autoencoder.py  the VAE
diffusion.py    the U-Net
lora.py         adapters beside a U-Net
upscaling.py   an upscaler: the diffusion task on crops, behind a base model
classifier.py   the classifier of noisy latents
"""
