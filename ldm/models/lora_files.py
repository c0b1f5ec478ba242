"""A LoRA's name => its checked file: data and nothing that runs, made for the model that it is put into.

A LoRA is one safetensors file. Its header may hold PEFT's config, from which stock loaders build the adapters; that is
where a stranger's file could name a module to import, or a regular expression to hang in.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.nn.functional import conv2d

from ldm.models.fingerprint import base_fingerprint
from ldm.models.lora import METADATA, WEIGHTS
from ldm.models.safety import MAX_JSON_BYTES

#: PEFT's settings that a file may set to numbers, to texts that nothing reads, and to what they always are. Any other
#: must be off, as it is by default.
NUMBERS = ("r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "lora_bias", "fan_in_fan_out", "inference_mode",
           "qalora_group_size")  # fmt: skip
NOTES = ("task_type", "peft_version", "base_model_name_or_path", "revision")
FIXED = {"peft_type": "LORA", "megatron_core": "megatron.core"}
LAYER = re.compile(r"[\w.-]+")  # a layer's name; PEFT takes others for regular expressions
PATTERN = re.compile(r"\^?[\w.-]+\$?")
#: Hub options of stock loaders, which find a file.
FINDING = ("revision", "subfolder", "token", "cache_dir", "force_download", "local_files_only")
#: NETWORK.LAYER.lora_A.weight, and how else diffusers spells the two matrices
MATRIX = re.compile(
    r"(?P<network>unet|text_encoder)\.(?P<layer>.+?)\."
    r"(?:(?P<A>lora_A|lora\.down|lora_linear_layer\.down)|lora_B|lora\.up|lora_linear_layer\.up)\.weight"
)


class OtherBaseWarning(UserWarning):
    """A LoRA was trained on other weights than those of the model that it is put into."""


@dataclass(frozen=True)
class LoRAFile:
    """A checked file.

    Attributes:
        shapes: of its tensors, by name.
        facts: what `ldm train` wrote into it (`LoRAFacts`); empty if somebody else made it.
    """

    path: Path
    shapes: dict[str, tuple[int, ...]]
    facts: dict[str, Any]


def find_lora(source: str | PathLike[str], weight_name: str | None = None, **options: Any) -> Path:
    """The file of a LoRA: `source` is the file, a folder that holds it, a run, or a Hub id.

    Raises:
        FileNotFoundError: if a folder holds none, or more than one.
        ValueError: for a file of another format.
    """
    place = Path(source).expanduser()
    for name in (weight_name, source if place.is_file() else None):
        if name is not None and Path(name).suffix != ".safetensors":
            raise ValueError(f"{name}: expected a .safetensors file; other weights are pickles, which can run code")
    if place.is_file():
        return place
    if place.is_dir():
        place = place / (options.get("subfolder") or "")
        if weight_name is None and (place / "lora" / WEIGHTS).exists():
            return place / "lora" / WEIGHTS  # a run
        named = place / (weight_name or WEIGHTS)
        found = [named] if named.exists() or weight_name else sorted(place.glob("*.safetensors"))
        if len(found) != 1 or not found[0].exists():
            hint = ": it is in PEFT's own format" if (place / "adapter_config.json").exists() else ""
            raise FileNotFoundError(f"{place}: expected {weight_name or WEIGHTS}, found none{hint}")
        return found[0]
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", str(source)) or place.parent.exists():
        raise FileNotFoundError(f"{source}: there is no such folder or file; expected a LoRA, such as RUN/lora")
    from huggingface_hub import hf_hub_download

    chosen: dict[str, Any] = {key: options[key] for key in FINDING if options.get(key) is not None}
    return Path(hf_hub_download(str(source), weight_name or WEIGHTS, **chosen))


def read_lora(path: Path) -> LoRAFile:
    """Check a file's header; no tensor is read.

    Raises:
        ValueError: naming the file, and the key for settings that could do more than build adapters.
    """
    try:
        with safe_open(path, framework="pt") as weights:
            shapes = {name: tuple(weights.get_slice(name).get_shape()) for name in weights.keys()}  # noqa: SIM118
            metadata: Mapping[str, str] = weights.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{path}: expected whole safetensors ({str(error)[:120]})") from None
    if not shapes or not all("lora" in name for name in shapes):
        raise ValueError(f"{path}: is no LoRA: it holds other weights than adapters")
    check_settings(path, _parse(path, "lora_adapter_metadata", metadata))
    return LoRAFile(path, shapes, _parse(path, METADATA, metadata))


def check_settings(path: Path, settings: Mapping[str, Any]) -> None:
    """Refuse settings of PEFT that import modules, change the base, or name layers by regular expressions."""
    for key, value in settings.items():
        name = key.split(".", 1)[-1]
        if name in NUMBERS:
            fine = value is None or isinstance(value, int | float)
        elif name in NOTES:
            fine = value is None or isinstance(value, str)
        elif name in FIXED:
            fine = value == FIXED[name]
        elif name == "target_modules":
            fine = isinstance(value, list) and all(isinstance(one, str) and LAYER.fullmatch(one) for one in value)
        elif name in ("rank_pattern", "alpha_pattern"):
            fine = isinstance(value, dict) and all(
                PATTERN.fullmatch(one) and isinstance(number, int | float) for one, number in value.items()
            )
        elif name == "init_lora_weights":
            fine = isinstance(value, bool) or value == "gaussian"
        else:
            fine = not value or value == "none"
        if not fine:
            raise ValueError(f"{path}: lora_adapter_metadata: {key[:80]}: it can't be {str(value)[:80]}; remove it")


def check_fits(file: LoRAFile, pipeline: Any) -> str | None:
    """Compare a LoRA with the networks that it is put into.

    Returns:
        A warning if it was trained on other weights of the same shapes, as far as the file says.
    Raises:
        ValueError: as `check_shapes` does.
    """
    check_shapes(file, pipeline)
    known = file.facts.get("base_weights")
    if isinstance(known, list) and base_fingerprint(pipeline.unet) not in known:
        base = file.facts.get("base")
        trained = f"trained beside {base}" if isinstance(base, str) else "trained beside another model"
        return f"{file.path}: was {trained}; this model has other weights, so pictures may be worse"
    return None


def check_shapes(file: LoRAFile, pipeline: Any) -> None:
    """Raise a ValueError if a layer that a LoRA is for doesn't exist, or has another shape."""
    base = f", of {file.facts['base']}" if isinstance(file.facts.get("base"), str) else ""
    for name, shape in file.shapes.items():
        matched = MATRIX.fullmatch(name)
        if matched is None:
            continue  # another spelling, which stock loaders compare
        network = getattr(pipeline, matched["network"], None)
        layer = None if network is None else _layer(network, matched["layer"])
        if layer is None:
            raise ValueError(
                f"{file.path}: is the LoRA of another model{base}: this one has no {name.rsplit('.lora', 1)[0]}"
            )
        out, into = layer.weight.shape[:2]
        edge, expected = (shape[1:2], into) if matched["A"] else (shape[:1], out)
        if edge != (expected,):
            raise ValueError(
                f"{file.path}: is the LoRA of another model{base}: {name} is {list(shape)}, that layer takes {into} "
                f"channels and makes {out}"
            )


def merge_lora(unet: nn.Module, file: LoRAFile) -> None:
    """Add a LoRA to the weights that it belongs to, in place, as PEFT's merge does: W + (alpha / r) B A.

    Raises:
        ValueError: if it has more than the two matrices of each layer of a U-Net, such as DoRA's norms.
    """
    with safe_open(file.path, framework="pt") as opened:
        weights = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        settings = _parse(file.path, "lora_adapter_metadata", opened.metadata() or {})
    for name in weights:
        if not re.fullmatch(r"unet\..+\.lora_[AB]\.weight", name):
            raise ValueError(f"{file.path}: expected a plain LoRA of the U-Net, got {name}")
    odd = [key for key in ("use_rslora", "rank_pattern", "alpha_pattern") if settings.get(f"unet.{key}")]
    if odd:
        raise ValueError(f"{file.path}: expected one rank and alpha for all layers, got {odd[0]}")
    with torch.no_grad():
        for name in (name for name in weights if name.endswith(".lora_A.weight")):
            layer: Any = unet.get_submodule(name.removeprefix("unet.").removesuffix(".lora_A.weight"))
            down, up = (weights[name.replace("_A.", f"_{one}.")].to(layer.weight) for one in "AB")
            scale = settings.get("unet.lora_alpha", len(down)) / len(down)
            if layer.weight.ndim == 2:
                change = up @ down
            elif layer.weight.shape[2:] == (1, 1):
                change = (up[..., 0, 0] @ down[..., 0, 0])[..., None, None]
            else:
                change = conv2d(down.transpose(0, 1), up).transpose(0, 1)
            layer.weight += change * scale


def _layer(network: nn.Module, name: str) -> Any:
    """A layer, out of its adapters if it has any; None if there is none of this name."""
    for spelled in (name, name.removeprefix("text_model.")):
        try:
            layer: Any = network.get_submodule(spelled)
        except AttributeError:
            continue
        layer = getattr(layer, "base_layer", layer)
        return layer if getattr(layer, "weight", None) is not None and layer.weight.ndim > 1 else None
    return None


def _parse(path: Path, key: str, metadata: Mapping[str, str]) -> dict[str, Any]:
    """The JSON object under a key of the header; {} if there is none."""
    text = metadata.get(key)
    if text is None:
        return {}
    try:
        value = json.loads(text) if len(text) < MAX_JSON_BYTES else None
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: {key} in its header: expected a JSON object")
    return value
