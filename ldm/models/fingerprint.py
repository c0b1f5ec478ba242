"""What a network computes, in 32 hex digits: what was computed by another one must not be taken for its own."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ldm.models.lora import active_adapters


def fingerprint(network: nn.Module, *facts: Any) -> str:
    """A hash of a network's class, config and weights, and of `facts`, as JSON holds them."""
    config: Any = network.config
    items = (config if isinstance(config, dict) else config.to_dict()).items()
    # where a config was found and which version wrote it down changes nothing
    config = {key: value for key, value in items if not key.startswith("_") and key != "transformers_version"}
    digest = hashlib.blake2b(digest_size=16)
    digest.update(json.dumps([type(network).__name__, config, facts], sort_keys=True, default=str).encode())
    for part in weights_of(network):
        digest.update(part)
    return digest.hexdigest()


def weights_fingerprint(network: nn.Module) -> str:
    """A hash of a network's weights alone: their names, shapes, dtypes and every bit."""
    digest = hashlib.blake2b(digest_size=16)
    for part in weights_of(network):
        digest.update(part)
    return digest.hexdigest()


def weights_state(network: nn.Module) -> tuple[Any, ...]:
    """Which tensors a network's weights are, and how often each was changed in place: equal while they stay the same.

    It reads no weight, so it costs microseconds. Tensors of inference mode don't count, and can hardly be changed.
    """
    tensors = [*network.parameters(), *network.buffers()]
    return tuple((id(one), one.data_ptr(), -1 if one.is_inference() else one._version, one.dtype) for one in tensors)


@torch.no_grad()
def count_change(network: nn.Module) -> None:
    """Let `weights_state` know of a change that was made through `.data`, as PEFT merges adapters."""
    for weight in network.parameters():
        if not weight.is_inference():
            weight.mul_(1)


def weights_of(network: nn.Module) -> Iterator[bytes | memoryview]:
    """A network's weights as bytes, in the order of their names, with what they are."""
    for name, tensor in sorted(base_weights(network).items()):
        data = tensor.detach().cpu().contiguous().flatten()
        yield f"\n{name} {data.dtype} {list(tensor.shape)}\n".encode()
        yield data.view(torch.uint8).numpy().data


def base_weights(network: nn.Module) -> dict[str, Tensor]:
    """A network's weights by name, as if it had no LoRA adapters."""
    weights = network.state_dict()
    return {name.replace(".base_layer.", "."): tensor for name, tensor in weights.items() if ".lora_" not in name}


def base_fingerprints(unet: nn.Module) -> list[str]:
    """A U-Net's weights without adapters, in hashes of each form in which the same model is found.

    In float32 it may be as it was trained or out of a file of half precision (`ldm export`); and it may be computed in
    half precision, after either.
    """
    forms: list[tuple[torch.dtype, ...]] = [
        (), (torch.float16,), (torch.bfloat16,), (torch.float16, torch.float32), (torch.float16, torch.bfloat16)
    ]  # fmt: skip
    return list(dict.fromkeys(base_fingerprint(unet, *form) for form in forms))


def base_fingerprint(unet: nn.Module, *dtypes: torch.dtype) -> str:
    """A hash of a U-Net's weights without adapters, cast to these dtypes, one after the other."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(base_weights(unet).items()):
        for dtype in dtypes:
            tensor = tensor.to(dtype)
        digest.update(f"\n{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def tokenizer_facts(tokenizer: Any) -> list[Any]:
    """All that decides which tokens a caption becomes."""
    if tokenizer.is_fast:
        rules = json.loads(tokenizer.backend_tokenizer.to_str())
        # what the last call left behind; padding and truncation to model_max_length are asked for in each
        rules = {key: value for key, value in rules.items() if key not in ("padding", "truncation")}
    else:
        rules = {"class": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab(), **tokenizer.init_kwargs}
    sides = [tokenizer.padding_side, tokenizer.truncation_side, tokenizer.special_tokens_map]
    return [rules, sides, tokenizer.model_max_length]


def model_sha256(pipeline: Any, *, adapters: bool = True) -> str:
    """Which model this is: the SHA-256, in 64 hex digits, of all that decides what a pipeline generates.

    Its networks as they are in memory (the same weights in another dtype generate something else), its tokenizer and
    its scheduler. Not where it lies, nor its default settings.

    Args:
        adapters: whether active LoRA adapters and their scales count, or the model is meant without them.
    """
    parts = [pipeline.unet, pipeline.vae, pipeline.text_encoder]
    facts = [
        [None if part is None else fingerprint(part) for part in parts],
        None if pipeline.tokenizer is None else tokenizer_facts(pipeline.tokenizer),
        type(pipeline.scheduler).__name__,
        {key: value for key, value in pipeline.scheduler.config.items() if not key.startswith("_")},
    ]
    if (low := getattr(pipeline, "low_res_scheduler", None)) is not None:  # an upscaler's
        facts.append({key: value for key, value in low.config.items() if not key.startswith("_")})
    if adapters and (active := active_adapters(pipeline)):
        facts.append([[adapter.sha256, adapter.scales] for adapter in active])
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()
