"""A model folder from a stranger => a folder that holds data and nothing that runs, or an error that says what does.

diffusers and transformers refuse most of a hostile folder themselves, some of it only while they load it, and with a
flag they run it. Here is read what the folder *says* before either of them is asked: which classes it names, whether
it brings code, whether its weights are what a safetensors header promises, whether a file leads elsewhere. There is no
flag that allows more.

    model_index.json      names known classes, for known components      (anything else imports a module by its name)
    *.json                no auto_map, no custom pipeline, no adapter of a network's, no attention kernel from the Hub
    *.safetensors         whole, and the only weights there are          (others are pickles, which run code)
    every file            lies in the folder, or in the Hub's cache      (a link could name any file of this machine)
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

PIPELINES = (
    "StableDiffusionPipeline",
    "StableDiffusionInstructPix2PixPipeline",
    "StableDiffusionInpaintPipeline",
    "StableDiffusionUpscalePipeline",
)
TOKENIZERS = ("CLIPTokenizer", "BertTokenizer", "T5Tokenizer", "GPT2Tokenizer")
FAST = (*(f"{name}Fast" for name in TOKENIZERS), "PreTrainedTokenizerFast", "TokenizersBackend")
#: component => library => classes that it may be. Every scheduler of diffusers computes, and loads nothing but numbers.
COMPONENTS: dict[str, dict[str, tuple[str, ...]]] = {
    "vae": {"diffusers": ("AutoencoderKL", "AutoencoderTiny")},
    "unet": {"diffusers": ("UNet2DConditionModel",)},
    "scheduler": {"diffusers": ("*Scheduler",)},
    "low_res_scheduler": {"diffusers": ("DDPMScheduler",)},
    "watermarker": {},  # none
    "text_encoder": {"transformers": ("CLIPTextModel", "BertModel", "T5EncoderModel", "GPT2Model", "GPTNeoModel")},
    "tokenizer": {"transformers": (*TOKENIZERS, *FAST)},
    "safety_checker": {"stable_diffusion": ("StableDiffusionSafetyChecker",)},
    "feature_extractor": {"transformers": ("CLIPImageProcessor", "CLIPFeatureExtractor")},
    "image_encoder": {"transformers": ("CLIPVisionModelWithProjection",)},
}
#: keys by which a config has other code loaded than that of its class
CODE_KEYS = ("auto_map", "custom_pipeline", "custom_pipelines", "trust_remote_code", "base_model_name_or_path",
             "quantization_config")  # fmt: skip
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".h5", ".msgpack")
MAX_JSON_BYTES = 1 << 27  # the largest tokenizer.json of the known encoders is a tenth of it


def check_model_folder(folder: str | Path) -> None:
    """Refuse a folder of a model, or of a pipeline, that could do more than be loaded.

    Raises:
        ValueError: naming the file and the key.
        OSError: if a file can't be read, or if there are pickled weights and no others.
    """
    root = Path(folder)
    real = root.resolve()
    # a snapshot in the Hub's cache is a folder of links to ../../blobs
    cached = (folder.parent.parent / "blobs" for folder in (real, real.parent) if folder.parent.name == "snapshots")
    homes = [real, *cached]
    files = list(_files(root))
    for path in files:
        target = path.resolve()
        if not any(target.is_relative_to(home) for home in homes):
            raise ValueError(f"{path}: leads out of the model's folder, to {target}")
        if path.exists() and not target.is_file() and not target.is_dir():
            raise ValueError(f"{path}: is a special file; expected plain ones")
    names = {path.relative_to(root).as_posix() for path in files}
    for path in files:
        if path.suffix == ".json":
            _check_json(path, adapter=_is_adapters_own(path, root))
        elif path.suffix == ".safetensors":
            _check_weights(path)
    if "model_index.json" in names:
        check_index(root / "model_index.json")
        if code := sorted(name for name in names if name.endswith(".py")):
            raise ValueError(
                f"{root / code[0]}: holds code, which a pipeline needs none of; delete it to load the rest"
            )
    for config in (path for path in files if path.name == "config.json"):
        _check_has_weights(config.parent, [path for path in files if path.parent == config.parent])


def check_index(path: Path) -> None:
    """Refuse a model_index.json that names other classes than those that a pipeline here is made of."""
    index = read_json(path)
    if index.get("_class_name") not in PIPELINES:
        named = str(index.get("_class_name"))[:80]
        raise ValueError(f"{path}: _class_name: expected {' or '.join(PIPELINES)}, got {named}")
    for name, value in index.items():
        if name not in COMPONENTS:
            if isinstance(value, list | dict):
                raise ValueError(f"{path}: {name[:80]}: there is no such component; expected {', '.join(COMPONENTS)}")
            continue
        if value is None or value == [None, None]:
            continue
        known = COMPONENTS[name]
        library, kind = value if isinstance(value, list) and len(value) == 2 else (None, None)
        if not any(_is_one_of(kind, kinds) for other, kinds in known.items() if other == library):
            allowed = " or ".join(f"{other}'s {', '.join(kinds)}" for other, kinds in known.items())
            raise ValueError(f"{path}: {name}: expected {allowed}, got {str(value)[:80]}")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises ValueError, naming the file, for anything else."""
    value = _parse(path)
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def _files(root: Path) -> Iterator[Path]:
    """Every file and link below a folder, but for hidden folders, which no loader looks into."""
    for parent, folders, names in os.walk(root):
        here = Path(parent)
        yield from (here / name for name in folders if (here / name).is_symlink())
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (here / name for name in sorted(names))


def _parse(path: Path) -> Any:
    if path.stat().st_size > MAX_JSON_BYTES:
        raise ValueError(f"{path}: is too large for JSON ({path.stat().st_size:,} bytes)")
    try:
        return json.loads(path.read_text("utf-8"))
    except RecursionError:
        raise ValueError(f"{path}: is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"{path}: expected JSON ({error})") from None


def _is_adapters_own(path: Path, root: Path) -> bool:
    """Whether it is PEFT's note beside an adapter, where no network is loaded from.

    Beside a network, or where one is looked for, transformers would follow it to another model.
    """
    home = path.parent
    network = home == root or home.name in COMPONENTS or (home / "config.json").exists()
    return path.name == "adapter_config.json" and not network


def _check_json(path: Path, *, adapter: bool = False) -> None:
    """Refuse keys that load code or another model's files, however deep they lie.

    Args:
        adapter: whether it may name the model that an adapter belongs to.
    """
    said = _parse(path)
    waiting = [said]
    while waiting:
        value = waiting.pop()
        if isinstance(value, list):
            waiting += value
        if not isinstance(value, dict):
            continue
        waiting += value.values()
        for key, named in value.items():
            if key in CODE_KEYS and named and not (adapter and key == "base_model_name_or_path"):
                raise ValueError(f"{path}: {key}: it has other code loaded than its class's; remove the key")
            if "attn_implementation" in key and named not in (None, "eager", "sdpa"):
                raise ValueError(f"{path}: {key}: expected eager or sdpa, got {str(named)[:80]}")
            if key in ("vocab_file", "merges_file") and isinstance(named, str) and _leads_out(named):
                raise ValueError(f"{path}: {key}: leads out of the model's folder, to {named[:80]}")
    if not isinstance(said, dict):
        return
    if path.name == "tokenizer_config.json":
        kind = said.get("tokenizer_class")
        if kind is not None and not _is_one_of(kind, ("*Tokenizer", "*TokenizerFast", "TokenizersBackend")):
            raise ValueError(f"{path}: tokenizer_class: expected a tokenizer of transformers, got {str(kind)[:80]}")
    if path.name.endswith(".safetensors.index.json"):
        shards = said.get("weight_map")
        if not isinstance(shards, dict) or not all(_is_plain_weights(name) for name in shards.values()):
            raise ValueError(f"{path}: weight_map: expected names of safetensors files beside it")


def _check_weights(path: Path) -> None:
    """Refuse what isn't safetensors, or whose header lies about what follows; nothing is read but the header."""
    try:
        with safe_open(path, framework="pt") as weights:
            weights.keys()
    except SafetensorError as error:
        raise ValueError(f"{path}: expected whole safetensors ({str(error)[:120]})") from None


def _check_has_weights(folder: Path, files: Sequence[Path]) -> None:
    if not any(path.suffix == ".safetensors" for path in files):
        pickles = sorted(path.name for path in files if path.suffix in PICKLES)
        if pickles:
            raise OSError(
                f"{folder / pickles[0]}: expected safetensors; these weights are a pickle, which can run any code"
            )


def _is_one_of(name: Any, known: Sequence[str]) -> bool:
    """Whether it is one of these names, whose star stands for letters and digits: never for a module's dot."""
    if not isinstance(name, str):
        return False
    return name in known or any(
        pattern[0] == "*" and name.isalnum() and name.endswith(pattern[1:]) for pattern in known
    )


def _is_plain_weights(name: Any) -> bool:
    return isinstance(name, str) and name.endswith(".safetensors") and not _leads_out(name) and "/" not in name


def _leads_out(name: str) -> bool:
    return os.path.isabs(name) or ".." in Path(name).parts or "\\" in name or "\0" in name
