"""The kinds of training, each with its data, networks, loss, validation and export.

autoencoder.py  the VAE
diffusion.py    the U-Net
lora.py         adapters beside a U-Net
distillation.py a student of few steps, beside the U-Net it learns from
upscaling.py    an upscaler behind a base model: crops, small pictures
classifier.py   the classifier of noisy latents
"""
