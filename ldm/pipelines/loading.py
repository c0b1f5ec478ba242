"""A pipeline's name => its folder, and no code of anybody else's on the way."""

from __future__ import annotations

import json
from os import PathLike
from pathlib import Path
from typing import Any

from diffusers import StableDiffusionPipeline

from ldm.models.safety import check_index

CODE = ("custom_pipeline", "trust_remote_code", "use_flashpack", "use_onnx")
PLACES = ("device_map", "quantization_config")


def check_options(options: dict[str, Any]) -> None:
    """Refuse the arguments of diffusers' from_pretrained that run a stranger's code; set `use_safetensors`, in place.

    Raises:
        ValueError: names the argument.
    """
    if options.setdefault("use_safetensors", True) is not True:
        raise ValueError("use_safetensors: expected True; other weights are pickles, which can run any code")
    for name in CODE:
        if options.pop(name, None):
            raise ValueError(f"{name}: a pipeline holds data alone, and no code of its own is run")
    for name in PLACES:
        if options.pop(name, None) is not None:
            raise ValueError(f"{name}: networks are loaded whole, as they are; then move them with pipe.to(device)")


def read_prompts(file: Path) -> tuple[str, ...]:
    """A prompt a line; none if there is no such file."""
    try:
        return tuple(file.read_text("utf-8").splitlines()) if file.exists() else ()
    except UnicodeDecodeError:
        raise ValueError(f"{file}: is not UTF-8") from None


def find_pipeline(name: str | PathLike[str], **asked: Any) -> Path:
    """A pipeline's folder as it is; a Hub id => the folder of its snapshot, with safetensors weights alone.

    Args:
        asked: from_pretrained's arguments, of which revision, variant, token, cache_dir, force_download and
            local_files_only choose the snapshot.
    Raises:
        FileNotFoundError: if a name that looks like a folder isn't a pipeline's.
        ValueError: if a downloaded model_index.json names classes that no pipeline here is made of; then nothing else
            is downloaded.
        OSError: if there is no such Hub id.
    """
    folder = Path(name).expanduser()
    if (folder / "model_index.json").exists():
        return folder
    if len(folder.parts) != 2 or folder.is_absolute() or folder.parent.exists():
        hint = f"; did you mean {folder / 'pipeline'}?" if (folder / "pipeline/model_index.json").exists() else ""
        raise FileNotFoundError(f"{folder} is not a pipeline folder: it has no model_index.json{hint}")
    from huggingface_hub import hf_hub_download

    choice = {"revision", "token", "cache_dir", "force_download", "local_files_only"}
    chosen: dict[str, Any] = {key: asked[key] for key in choice & asked.keys()}
    check_index(Path(hf_hub_download(str(name), "model_index.json", **chosen)))
    if "variant" in asked:
        chosen["variant"] = asked["variant"]
    return Path(StableDiffusionPipeline.download(str(name), use_safetensors=True, **chosen))


#: What configs say of how they were loaded.
LOADING = frozenset({"_name_or_path", "name_or_path", "is_local", "local_files_only"})


def forget_calls(tokenizer: Any) -> None:
    """Let a tokenizer forget how its last call padded and cut; the next one says it anew."""
    if tokenizer is not None and tokenizer.is_fast:
        tokenizer.backend_tokenizer.no_padding()
        tokenizer.backend_tokenizer.no_truncation()


def forget_loading(folder: Path) -> None:
    """Take out of a pipeline folder's configs what loading has put there."""
    for path in [folder / "model_index.json", *folder.glob("*/*config.json")]:
        said = json.loads(path.read_text("utf-8"))
        if said.keys() & LOADING:
            kept = {key: value for key, value in said.items() if key not in LOADING}
            path.write_text(json.dumps(kept, indent=2, ensure_ascii=False) + "\n", "utf-8")
