"""Latents in, latents out.

defaults.py        settings that travel with a model
decoding.py        what needn't be computed twice
steering.py        hooks on the U-Net
openvino.py        OpenVINO instead of torch
openvino_cache.py  networks in its format
"""
