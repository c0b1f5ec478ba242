"""Sharing a model: the folder for the Hub, with weights, model card, report and example pictures, and its upload."""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm

from ldm.data.grid import captioned_grid
from ldm.evaluation.provenance import RUN_FILE
from ldm.evaluation.report.charts import loss_by_t, save_png
from ldm.evaluation.report.page import FILE, PAGE, read_json, render
from ldm.models.fingerprint import model_sha256
from ldm.sharing import png_metadata
from ldm.sharing.model_card import Example, Terms, model_card
from ldm.sharing.redaction import redact_paths

EXAMPLES = 8  # pictures on the card
SHARD = "5GB"  # maximum of weights in one file, so that an interrupted download loses little
GALLERY, LOSS = "gallery.png", "loss_by_t.png"
#: Files that a push deletes if it doesn't write them, so that nothing of an older model stays, such as its metrics.
REPLACED = [
    "unet/*",
    "vae/*",
    "text_encoder/*",
    "tokenizer/*",
    "scheduler/*",
    "upscaler/*",
    "few_steps/*",
    "pictures/*",
    GALLERY,
    LOSS,
    PAGE,
    FILE,
    "prompts.txt",
    "labels.json",
    "numbers.json",
    "defaults.json",
]


def write_model(
    pipeline: Any,
    folder: Path,
    repo_id: str,
    terms: Terms,
    evaluation: Path | None = None,
    config: dict[str, Any] | None = None,
) -> None:
    """Write exactly the files to upload into an empty folder; they contain no path of this machine.

    Args:
        pipeline: an LDMPipeline in float32.
        repo_id: user/name.
        evaluation: a folder that `ldm evaluate` wrote for this very model.
        config: the run's, for the card; by default the one recorded by the evaluation.
    Raises:
        ValueError: if the folder isn't empty, the pipeline isn't in float32 (from which the fp16 variant is made), or
            the evaluation is of another model.
    """
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder}: expected an empty folder or none; its files would be mixed with the model's")
    for name, network in networks(pipeline):
        if network.dtype != torch.float32:
            raise ValueError(f"{name}: expected a pipeline in float32 to share, got {network.dtype}")
    sha256 = model_sha256(pipeline)
    if evaluation and not is_evaluation_of(evaluation, sha256):
        raise ValueError(f"evaluation: {evaluation} holds no evaluation of this very model; run ldm evaluate")
    save_weights(pipeline, folder)
    report, run = None, {"config": config, "step": None}
    if evaluation:
        report = read_json(evaluation / FILE)
        if (evaluation / RUN_FILE).exists():
            run = read_json(evaluation / RUN_FILE)
            run["config"] = config or run["config"]
    redact = partial(redact_paths, known=known_folders(report, run["config"]))
    if evaluation:
        report = redact(report)
        (folder / FILE).write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", "utf-8")
        (folder / PAGE).write_text(render(evaluation, redact), "utf-8")
        save_png(loss_by_t(report["text_use"]), folder / LOSS)
    examples = generate_examples(pipeline, folder, sha256)
    card = model_card(pipeline, repo_id, terms, sha256, examples, report, redact(run))
    (folder / "README.md").write_text(card, "utf-8")


def networks(pipeline: Any) -> Iterator[tuple[str, Any]]:
    """Name and network of the pipeline's components with weights."""
    for name in ("unet", "vae", "text_encoder"):
        if (network := getattr(pipeline, name)) is not None:
            yield name, network


def save_weights(pipeline: Any, folder: Path) -> None:
    """Save the pipeline and its fp16 variant, with the file names of diffusers and transformers."""
    pipeline.save_pretrained(folder, max_shard_size=SHARD)
    save_halves(pipeline, folder)  # second: `save_pretrained` deletes similarly named shards
    if pipeline.has_upscaler:
        save_halves(pipeline.upscaler, folder / pipeline.upscaler_folder)


def save_halves(pipeline: Any, folder: Path) -> None:
    """Save the fp16 variant of each network of a pipeline beside it."""
    for name, network in networks(pipeline):
        config = (folder / name / "config.json").read_bytes()
        half = copy.deepcopy(network).half()
        half.save_pretrained(folder / name, variant="fp16", max_shard_size=SHARD)
        (folder / name / "config.json").write_bytes(config)  # both variants share the config of float32


def known_folders(report: dict[str, Any] | None, config: dict[str, Any] | None) -> list[str]:
    """The folders of the run and the data: paths below them stay, relative to the folder's parent."""
    folders: list[Any] = []
    if report:
        model = Path(report["model"]["folder"])
        folders += [model.parent if model.name == "pipeline" else model, report["data"]["source"]]
    if config:
        folders += [config.get("run"), config.get("data", {}).get("source")]
    return [str(folder) for folder in folders if folder]


def generate_examples(pipeline: Any, folder: Path, sha256: str) -> list[Example]:
    """Generate the card's pictures, one file each, and gallery.png with all of them; none is selected by hand."""
    conditions: list[dict[str, str]] = []
    if pipeline.tokenizer is not None:
        conditions = [{"prompt": prompt} for prompt in pipeline.example_prompts]
    elif pipeline.labels:
        conditions = [{"class_label": name} for name in pipeline.labels.names]
    elif not pipeline.condition_channels:
        conditions = [{}] * EXAMPLES
    pictures: list[Image.Image] = []
    examples: list[Example] = []
    bar = dict(getattr(pipeline, "_progress_bar_config", {}))
    pipeline.set_progress_bar_config(disable=True)  # one bar for all pictures
    for seed, condition in enumerate(tqdm(conditions[:EXAMPLES], desc="generating examples", unit="picture")):
        given = {**condition, **asdict(pipeline.defaults), "seed": seed}  # named: a call without them is a student's
        (picture,) = pipeline(**given).images
        png_metadata.stamp([picture], pipeline, sha256, **given)
        file = f"pictures/{seed}.png"
        png_metadata.save(picture, folder / file)
        pictures.append(picture)
        examples.append(Example(next(iter(condition.values()), ""), file))
    pipeline.set_progress_bar_config(**bar)
    if pictures:
        captioned_grid(pictures, [one.prompt for one in examples], edge=192).save(folder / GALLERY)
    return examples


def is_evaluation_of(folder: Path, sha256: str) -> bool:
    """Whether the folder holds an evaluation of the model with this hash."""
    path = folder / FILE
    return path.exists() and read_json(path)["model"]["sha256"] == sha256


def push(
    pipeline: Any,
    repo_id: str,
    terms: Terms,
    *,
    evaluation: Path | None = None,
    config: dict[str, Any] | None = None,
    private: bool | None = None,
    token: str | None = None,
    commit_message: str = "Upload a model made with ldm",
    create_pr: bool = False,
) -> str:
    """Upload the files of `write_model` in one commit; returns the repository's address."""
    from huggingface_hub import HfApi

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        write_model(pipeline, folder, repo_id, terms, evaluation, config)
        api = HfApi(token=token)
        address = api.create_repo(repo_id, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            commit_message=commit_message,
            create_pr=create_pr,
            delete_patterns=REPLACED,
        )
    return str(address)
