"""Latents in, latents out.

sampling.py        the denoising loop
tiling.py          large pictures, a tile at a time
colors.py          a small picture's colors for the large one made of it
samplers.py        samplers by name
decoding.py        latents => pixels
defaults.py        sampling settings that travel with a model
openvino.py        OpenVINO instead of torch
openvino_cache.py  networks in its format, kept on disk
"""
