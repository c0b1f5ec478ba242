"""LoRA: small trained matrices beside frozen weights.

Hu et al. 2021, "LoRA: low-rank adaptation of large language models", equation 3:

    W x  =>  W x + (alpha / r) B A x,   A: r × in, B: out × r, B = 0 at the start

PEFT puts them into stock networks, and diffusers saves and loads them. Here: which layers get one, the file that stock
`load_lora_weights` reads, and which adapters a pipeline has, for hashes and for the settings in pictures.
DoRA (Liu et al. 2024, "DoRA: weight-decomposed low-rank adaptation") also learns the norm of each row of W + B A.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm.system.checks import check

WEIGHTS, FACTS = "pytorch_lora_weights.safetensors", "lora.json"
STUDENT_FOLDER = "few_steps"  # in a pipeline's: of a LoRA of few steps, the pipeline's student
METADATA = "ldm"  # the key of FACTS' content in the header of WEIGHTS
NAME = "default"  # of the adapter that is trained
#: The attention projections of text encoders, by config.model_type.
TEXT_TARGETS = {
    "clip_text_model": ("q_proj", "k_proj", "v_proj", "out_proj"),
    "bert": ("query", "key", "value", "attention.output.dense"),
    "t5": ("q", "k", "v", "o"),
}
#: How stock loaders of text encoders spell PEFT's lora_A and lora_B; they know its own spelling for CLIP alone.
TEXT_SPELLING = {".lora_A.": ".lora_linear_layer.down.", ".lora_B.": ".lora_linear_layer.up."}


@dataclass(frozen=True)
class LoRAConfig:
    """Adapters on the frozen networks of `init`, trained in their place.

    Attributes:
        rank: r of each adapter; 0 trains the U-Net itself.
        alpha: adapters count alpha / rank; null is the rank, so 1.
        targets: layers of the U-Net that get one, by the end of their names; by default attention's projections.
        text_encoder: adapters on the text encoder's attention, too. Captions are then encoded at each step.
        dora: learn the norm of each row, too; for the U-Net alone.
        trigger: words that all captions have, which call what is learned; null is the phrase they have in common.
        keep: share of the samples, up to 0.9, that show the model's own pictures, of prompts without the trigger words;
            it holds such prompts to what they were (prior preservation). 0 is none.
    """

    rank: int = 0
    alpha: float | None = None
    targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")
    text_encoder: bool = False
    dora: bool = False
    trigger: str | None = None
    keep: float = 0.0

    def __post_init__(self) -> None:
        check("lora.rank", self.rank, at_least=0, at_most=4096)
        check("lora.keep", self.keep, at_least=0, at_most=0.9)
        if self.alpha is not None:
            check("lora.alpha", self.alpha, above=0)
        if not self.targets or not all(self.targets):
            raise ValueError("lora.targets: expected names of layers, such as to_q")
        if self.dora and self.text_encoder:
            raise ValueError(
                "lora.dora: transformers can't load DoRA's norms of a text encoder; set lora.text_encoder=false, or "
                "lora.dora=false"
            )
        if self.keep and self.text_encoder:
            raise ValueError(
                "lora.keep: the model reads captions by its own text encoder, which learns; set lora.text_encoder=false"
            )
        if self.trigger is not None and not self.trigger.strip():
            raise ValueError("lora.trigger: expected words that all captions have, or null to find them")
        for name in ("text_encoder", "dora", "trigger", "keep"):
            if getattr(self, name) and not self.rank:
                raise ValueError(f"lora.{name}: it needs adapters; set lora.rank, for example to 8")


@dataclass(frozen=True)
class LoRAFacts:
    """What is known of a LoRA besides its weights.

    Attributes:
        base: the name of the model that it belongs to.
        base_weights: `base_fingerprints` of that model's U-Net.
        trigger: the words that call what it learned: `lora.trigger`, or what its captions have in common; may be empty.
        prompts: a few of its captions.
        rank, alpha, dora, text_encoder: as in LoRAConfig.
        few_steps: the sampling steps that it was trained for; 0 is any.
        sampler: by which few steps are taken.
    """

    base: str
    base_weights: list[str]
    trigger: str = ""
    prompts: list[str] = field(default_factory=list)
    rank: int = 0
    alpha: float = 0.0
    dora: bool = False
    text_encoder: bool = False
    few_steps: int = 0
    sampler: str = "ddim"

    def to_dict(self) -> dict[str, Any]:
        """What lora.json has: the sampler where it was trained for few steps, since any other has the base's."""
        facts = asdict(self)
        return facts if self.few_steps else {key: facts[key] for key in facts if key not in ("few_steps", "sampler")}


def require_peft() -> None:
    """Raise a ModuleNotFoundError that says how to install PEFT, unless it is there."""
    if importlib.util.find_spec("peft") is None:
        raise ModuleNotFoundError("LoRA adapters need the package peft; install it with: pip install 'ldm[lora]'")


# --- into networks ----------------------------------------------------------------------------------


def add_adapters(unet: Any, text: Any | None, config: LoRAConfig) -> None:
    """Freeze a U-Net, and a text encoder if it is to have adapters, and add those, in place.

    A is random, from torch's default generator, and B zero: the networks compute what they did before.

    Args:
        text: the transformers model; None leaves it out.
    Raises:
        ValueError: naming the key, if a target names no layer.
        ModuleNotFoundError: if PEFT isn't installed.
    """
    require_peft()
    for network in (unet, text):
        if network is not None:
            network.requires_grad_(False)
    check_targets(unet, config.targets)
    unet.add_adapter(peft_config(config, config.targets, dora=config.dora), adapter_name=NAME)
    if text is not None:
        if text.config.model_type not in TEXT_TARGETS:
            raise ValueError(
                f"lora.text_encoder: it adapts {', '.join(TEXT_TARGETS)}, and this model's text encoder is a "
                f"{text.config.model_type}; set it to false"
            )
        text.add_adapter(peft_config(config, TEXT_TARGETS[text.config.model_type]), adapter_name=NAME)


def peft_config(config: LoRAConfig, targets: Sequence[str], *, dora: bool = False) -> Any:
    """PEFT's own config of these adapters."""
    from peft import LoraConfig

    alpha: Any = alpha_of(config)
    return LoraConfig(r=config.rank, lora_alpha=alpha, target_modules=list(targets), use_dora=dora)


def alpha_of(config: LoRAConfig) -> float:
    """The config's alpha, which by default is its rank."""
    return config.rank if config.alpha is None else config.alpha


def check_targets(unet: nn.Module, targets: Sequence[str]) -> None:
    """Refuse a target that names no layer with weights of its own."""
    layers = [name for name, part in unet.named_modules() if isinstance(part, nn.Linear | nn.Conv2d)]
    for target in targets:
        if not any(f".{name}".endswith(f".{target}") for name in layers):
            known = sorted(
                {name.split(".", 4)[-1].removeprefix("transformer_blocks.0.") for name in layers if "attn" in name}
            )
            raise ValueError(
                f"lora.targets: no linear or convolutional layer of the U-Net is named {target}; there are "
                f"{', '.join(known[:6])}, …"
            )


# --- out of networks --------------------------------------------------------------------------------


def adapter_weights(network: nn.Module, name: str = NAME) -> dict[str, Tensor]:
    """The tensors of an adapter, named as PEFT saves them; none if the network has no such adapter."""
    from peft.utils import get_peft_model_state_dict

    if name not in (getattr(network, "peft_config", None) or {}):
        return {}
    weights: dict[str, Tensor] = get_peft_model_state_dict(network, adapter_name=name)
    return weights


def save_adapters(
    folder: Path, unet: dict[str, Tensor], text: dict[str, Tensor], configs: dict[str, Any], facts: LoRAFacts
) -> None:
    """Save adapters as stock `load_lora_weights` reads them, with what is known of them beside and inside.

    Args:
        unet, text: `adapter_weights`; an empty one for no adapters of the text encoder.
        configs: PEFT's configs by "unet" and "text_encoder". They go into the file: stock loaders assume an alpha
            without them, and can't load an encoder but CLIP.
    """
    from diffusers import StableDiffusionPipeline
    from safetensors.torch import load_file, save

    StableDiffusionPipeline.save_lora_weights(
        folder,
        unet_lora_layers=unet,
        text_encoder_lora_layers={stock_name(name): one for name, one in text.items()} or None,
    )
    described = {
        f"{network}.{name}": sorted(value) if isinstance(value, set) else value
        for network, config in configs.items()
        for name, value in config.to_dict().items()
    }
    content = json.dumps(facts.to_dict(), ensure_ascii=False)
    metadata = {
        "format": "pt",
        "lora_adapter_metadata": json.dumps(described, indent=2, sort_keys=True),
        METADATA: content,
    }
    (folder / WEIGHTS).write_bytes(in_order(save(load_file(folder / WEIGHTS), metadata=metadata)))
    (folder / FACTS).write_text(json.dumps(facts.to_dict(), indent=2, ensure_ascii=False) + "\n", "utf-8")


def in_order(file: bytes) -> bytes:
    """A safetensors file with its header's notes in order: the library writes several of them in any."""
    start = 8 + int.from_bytes(file[:8], "little")
    header = json.loads(file[8:start])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8
    return len(text).to_bytes(8, "little") + text + file[start:]


def stock_name(name: str) -> str:
    """PEFT's name of a text encoder's weight => the one that stock loaders take for any encoder."""
    for ours, stock in TEXT_SPELLING.items():
        name = name.replace(ours, stock)
    return name


# --- which they are ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Adapter:
    """An active adapter of a pipeline.

    Attributes:
        name: by which `set_adapters` knows it.
        sha256: of its tensors and their alpha / rank, in all networks.
        scale: it counts so much; None if not everywhere the same.
        scales: so much in each layer.
    """

    name: str
    sha256: str
    scale: float | None
    scales: dict[str, float]


def active_adapters(pipeline: Any) -> list[Adapter]:
    """The adapters that add to what a pipeline's networks compute; one that was merged is part of their weights."""
    networks = {name: getattr(pipeline, name, None) for name in ("unet", "text_encoder")}
    names = dict.fromkeys(name for one in networks.values() for name in getattr(one, "peft_config", None) or {})
    if not names:
        return []
    from peft.tuners.lora import LoraLayer

    found = []
    for name in names:
        digest, scales = hashlib.sha256(), {}
        for which, network in networks.items():
            if network is None:
                continue
            for key, tensor in sorted(adapter_weights(network, name).items()):
                digest.update(f"\n{which}.{key} {tensor.dtype} {list(tensor.shape)}\n".encode())
                digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
            for place, layer in network.named_modules():
                if isinstance(layer, LoraLayer) and name in layer.scaling:
                    whole = layer.lora_alpha[name] / (
                        math.sqrt(layer.r[name]) if network.peft_config[name].use_rslora else layer.r[name]
                    )
                    digest.update(f"\n{which}.{place} {whole}".encode())
                    counts = name in layer.active_adapters and not layer.disable_adapters and not layer.merged
                    scales[f"{which}.{place}"] = layer.scaling[name] / whole if counts else 0.0
        if any(scales.values()):
            first, *rest = scales.values()
            even = all(math.isclose(scale, first, rel_tol=1e-9) for scale in rest)
            found.append(Adapter(name, digest.hexdigest(), round(first, 9) if even else None, scales))
    return found
