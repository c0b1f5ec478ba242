"""Latents in, latents out.

sampling.py        the denoising loop
samplers.py        samplers by name
decoding.py        latents => pixels
defaults.py        sampling settings that travel with a model
openvino.py        OpenVINO instead of torch
openvino_cache.py  networks in its format, kept on disk
"""
