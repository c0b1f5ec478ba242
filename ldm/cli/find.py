"""The model that someone names, or that lies where models usually are."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

DEFAULT_MODELS = ("models/emoji", "runs/demo/pipeline")  # for `ldm app`
EVERY_MODEL = ("models/*/model_index.json", "runs/*/pipeline/model_index.json")  # for `ldm sample --like`
TRAIN_ONE = (
    "train one: `ldm data openmoji data/openmoji-demo --subset demo`, `ldm train vae --config demo`, "
    "`ldm train ldm --config demo`"
)


def default_model() -> str:
    """The first of DEFAULT_MODELS that exists.

    Raises:
        FileNotFoundError: if none does, with the commands that make one.
    """
    for folder in DEFAULT_MODELS:
        if (Path(folder) / "model_index.json").exists():
            return folder
    raise FileNotFoundError(
        f"there is no model in {' or '.join(DEFAULT_MODELS)}; name yours with --model FOLDER, or {TRAIN_ONE}"
    )


def find_model(name: str) -> tuple[Path, Path, dict[str, Any] | None]:
    """The pipeline's folder, where its evaluation is kept, and the run's resolved config, if it is of a run.

    Raises:
        FileNotFoundError: if a name that looks like a folder is neither a run nor a pipeline.
    """
    from ldm.models.lora import STUDENT_FOLDER, WEIGHTS
    from ldm.pipelines.loading import find_pipeline

    path = Path(name)
    if (path / "pipeline/model_index.json").exists():
        folder, run = path / "pipeline", path
    elif (path / "model_index.json").exists():
        folder, run = path, path.resolve().parent
    elif path.name == STUDENT_FOLDER and (path.parent / "model_index.json").exists():
        folder, run = path, path.resolve().parent.parent
    elif path.exists() or not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) or path.parent.exists():
        if (path / "lora" / WEIGHTS).exists():
            raise FileNotFoundError(f"{path} holds a LoRA; name its base, and this with --lora {path}")
        raise FileNotFoundError(
            f"{path} is neither a run nor a pipeline folder: it has no pipeline/, no model_index.json"
        )
    else:
        folder = run = find_pipeline(name)
    called = path.name
    if called == STUDENT_FOLDER:  # of which each model may have one
        called = f"{path.resolve().parent.name}-{called}"
    of_run = folder.name == "pipeline"
    config = newest_state(run).get("config") if of_run else None
    home = (path if folder != path else path.parent) / "evaluation" if of_run else Path("runs") / f"{called}-evaluation"
    return folder, home, config


def run_of(folder: Path) -> tuple[Path | None, int | None]:
    """The run that a pipeline folder belongs to, and the step of its newest checkpoint, as far as there are any."""
    if folder.name != "pipeline":
        return None, None
    run = folder.resolve().parent
    return run, newest_state(run).get("step")


def newest_state(run: Path) -> dict[str, Any]:
    """state.json of the newest checkpoint of the training that wrote RUN/pipeline; empty without one."""
    from ldm.training.checkpoint import checkpoint_folder, checkpoints

    found = [path for task in ("distill", "ldm") for path in checkpoints(checkpoint_folder(run, task))]
    state: dict[str, Any] = json.loads((found[-1] / "state.json").read_text("utf-8")) if found else {}
    return state


def load(folder: str, dtype: str, engine: str | None) -> Any:
    """The pipeline on the best device for an engine, in a dtype of this name or, for auto, in the one that suits it."""
    from ldm import LDMPipeline

    device, kind = device_and_dtype(dtype, engine)
    return LDMPipeline.from_pretrained(folder, dtype=kind).to(device)


def load_upscaler(name: str, dtype: str) -> Any:
    """The same for an upscaler: the folder's own, or the one behind a pipeline.

    Raises:
        FileNotFoundError: if there is none.
    """
    from ldm.pipelines.cascade import Origin, no_upscaler
    from ldm.pipelines.loading import UPSCALER, find_pipeline
    from ldm.pipelines.upscale import LDMUpscalePipeline

    folder: Path | None = find_pipeline(name)
    assert folder is not None
    if json.loads((folder / "model_index.json").read_text("utf-8")).get("_class_name") != UPSCALER:
        folder = Origin(name, folder).find_upscaler()
        if folder is None:
            raise no_upscaler(name)
    device, kind = device_and_dtype(dtype)
    return LDMUpscalePipeline.from_pretrained(folder, dtype=kind).to(device)


def device_and_dtype(dtype: str, engine: str | None = None) -> tuple[Any, Any]:
    """The best device for an engine, and a dtype by name or, for auto, the one that suits the device."""
    import torch

    from ldm.system import devices

    device = torch.device("cpu") if engine == "openvino" else devices.best_device()
    return device, devices.best_dtype(device) if dtype == "auto" else devices.dtype(dtype)


def find_by_hash(
    named: str | None, sha256: str, dtype: str, engine: str | None, upscaler: str | None = None
) -> tuple[Any, str]:
    """The pipeline that was named, or the one of this hash among models/ and runs/; and its hash.

    Args:
        dtype: of the networks' weights, on which the hash depends.
        engine: what is going to compute it.
        upscaler: the hash of the upscaler that must be behind it, unless the pipeline was named.
    Raises:
        ValueError: if none was named and none of them has it.
    """
    from ldm.models.fingerprint import model_sha256

    folders = [str(path.parent) for pattern in EVERY_MODEL for path in sorted(Path().glob(pattern))]
    for folder in [named] if named else folders:
        pipeline = load(folder, dtype, engine)
        for one in (pipeline, pipeline.student) if pipeline.has_student else (pipeline,):
            found = model_sha256(one)
            if found == sha256 and (named or upscaler is None or has_upscaler(one, upscaler)):
                return one, found
        if named:
            found = model_sha256(pipeline)
            print(
                f"warning: {named} is not the model that made it (SHA-256 {found[:12]}…, "
                f"not {sha256[:12]}…), so the picture will be another one",
                file=sys.stderr,
            )
            return pipeline, found
    tried = ", ".join(folders) or "there are no models"
    behind = "" if upscaler is None else f", with the upscaler {upscaler[:12]}… behind it"
    raise ValueError(
        f"model: the picture's model has the SHA-256 {sha256[:12]}…{behind}, as none of these has: {tried}; name its "
        "folder"
    )


def has_upscaler(pipeline: Any, sha256: str) -> bool:
    """Whether the upscaler with this hash is behind a pipeline."""
    from ldm.models.fingerprint import model_sha256

    return pipeline.has_upscaler and model_sha256(pipeline.upscaler) == sha256
