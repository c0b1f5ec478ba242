"""The networks: stock diffusers and transformers classes, built from short configs or loaded.

vae.py           pixels  => latents => pixels
text_encoder.py  caption => context
word_vectors.py  MiniLM's word vectors as a text encoder of 4 MB in fp16
unet.py          x_t, t, context => prediction
conditioning.py  conditions of the U-Net besides x_t and t
lora.py          adapters beside frozen weights
lora_files.py    a LoRA from anywhere => a file of adapters of this model's shapes
ema.py           the average of the U-Net's weights
power_ema.py     averages whose width is chosen after training: the mathematics
ema_snapshots.py their snapshots, and the average of any width rebuilt from them
classifier.py    x_t, t => class
captioner.py     pictures => captions, by any image-to-text network in a folder
loading.py       a folder => the network in it, with every weight
safety.py        a model folder from anywhere => one that holds data and nothing that runs
fingerprint.py   what a network computes, in 32 hex digits
"""
