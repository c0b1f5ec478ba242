"""What is trained.

autoencoder.py  the VAE
classifier.py   the classifier of noisy latents
"""
