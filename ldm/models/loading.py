"""A name => a folder that was checked => the network in it, with every weight that its config asks for.

Stock loaders warn where weights don't fit the config, and leave the rest random: a VAE's file in a U-Net's place draws
noise, and nobody is told. Here that is an error, for each network that is loaded.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

HUB_FILES = ["*.json", "*.safetensors", "*.txt", "*.model"]
NETWORKS = ("vae", "unet", "text_encoder", "image_encoder")  # of a pipeline
NAMED = 3  # keys in an error


def find_model(name: str | Path) -> Path:
    """A folder as it is; a Hub id => the folder of its snapshot, which is downloaded without code and pickles.

    Raises:
        OSError: if there is no such folder or id.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if not re.fullmatch(r"(\w[\w.-]*/)?\w[\w.-]*", str(name)):
        raise FileNotFoundError(f"there is no folder {str(name)[:200]!r}")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(name), allow_patterns=HUB_FILES))
    except OSError as error:  # its words are of caches and environment variables
        raise FileNotFoundError(
            f"{name}: there is no such folder, and none of this name comes from the Hub ({type(error).__name__})"
        ) from error


@contextmanager
def loading(folder: Path) -> Iterator[None]:
    """Inside, a library loads a folder that was checked; what goes wrong there becomes a ValueError that names it."""
    try:
        yield
    except (OSError, ImportError):
        raise
    except Exception as error:  # a config that makes no network, weights of other shapes
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{folder}: its files make no model ({type(error).__name__}: {reason})") from error


def load_network(kind: Any, folder: Path, *, unused: tuple[str, ...] = (), whole: bool = True, **options: Any) -> Any:
    """A network of a class of diffusers or transformers, from a folder that was checked.

    Args:
        unused: how the names of weights begin that may be missing.
        whole: whether the file may hold no other weights; a text encoder is often a part of what its file holds.
        options: of the class's `from_pretrained`.
    Raises:
        ValueError: naming the file and the keys, if the weights are not those of the config.
    """
    with loading(folder):
        network, told = kind.from_pretrained(
            folder, use_safetensors=True, local_files_only=True, output_loading_info=True, **options
        )
    lacking = sorted(key for key in told["missing_keys"] if not key.startswith(unused))
    foreign = sorted(told["unexpected_keys"]) if whole else []
    if lacking or foreign:
        files = list(folder.glob("*.safetensors"))
        wrong = [f"lacks {_named(lacking)}"] * bool(lacking) + [f"holds {_named(foreign)}"] * bool(foreign)
        raise ValueError(
            f"{files[0] if len(files) == 1 else folder}: its weights are not those of the {type(network).__name__} in "
            f"config.json: it {' and '.join(wrong)}; is it the file of another network?"
        )
    return network


def load_networks(folder: Path, index: Mapping[str, Any], variant: str | None, dtype: Any) -> dict[str, Any]:
    """The networks of a pipeline's folder that was checked, by name.

    Args:
        index: its model_index.json, without those that are not wanted.
        variant: of the weights' files, for the networks that have such files: "fp16".
        dtype: of the weights, or one by name, with "default" for the others; None is float32.
    """
    found = {}
    for name in NETWORKS:
        library, kind = index.get(name) or ("", None)
        if kind is not None:
            chosen = dtype.get(name, dtype.get("default")) if isinstance(dtype, dict) else dtype
            options = {} if chosen is None else {"dtype": chosen}
            if variant and any((folder / name).glob(f"*.{variant}*.safetensors")):
                options["variant"] = variant
            kind = getattr(importlib.import_module(library), kind)
            found[name] = load_network(kind, folder / name, whole=library == "diffusers", **options)
    return found


def _named(keys: Collection[str]) -> str:
    """The first of these keys, and how many more there are."""
    more = f" and {len(keys) - NAMED} more" if len(keys) > NAMED else ""
    return ", ".join(list(keys)[:NAMED]) + more
