"""A model to share: the folder that goes to the Hub, with weights, a card that says what it is, and the proof."""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm

from ldm.data.grid import captioned_grid
from ldm.evaluation import run_record
from ldm.evaluation.report import curves as report_charts
from ldm.evaluation.report import page as report
from ldm.models.fingerprint import model_sha256
from ldm.sharing import png_metadata as recipe
from ldm.sharing.model_card import Drawn, Terms, model_card
from ldm.sharing.redaction import without_places

SHOWN = 8  # pictures on the card
SHARD = "5GB"  # of weights in one file, which is what a slow line can resume
GALLERY, LOSS = "gallery.png", "loss_by_t.png"
#: What a push replaces as a whole: of what it doesn't write anew nothing stays, such as another model's figures.
REPLACED = ["unet/*", "vae/*", "text_encoder/*", "tokenizer/*", "scheduler/*", "pictures/*", GALLERY, LOSS,
            report.PAGE, report.FILE, "prompts.txt", "labels.json", "defaults.json"]  # fmt: skip


def write_model(
    pipeline: Any,
    folder: Path,
    repo_id: str,
    terms: Terms,
    evaluation: Path | None = None,
    config: dict[str, Any] | None = None,
) -> None:
    """Write into an empty folder exactly what is uploaded; no path of this machine is in it.

    Args:
        pipeline: an LDMPipeline in float32.
        repo_id: user/name.
        evaluation: a folder that `ldm evaluate` wrote of this very model.
        config: the run's, for the card; by default the one that the evaluation knows.
    Raises:
        ValueError: if the folder holds anything, the pipeline isn't in float32 (of which the fp16 variant is made), or
            the evaluation is another model's.
    """
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder}: expected an empty folder or none; it would be mixed with what is there")
    for name, network in networks(pipeline):
        if network.dtype != torch.float32:
            raise ValueError(f"{name}: expected a pipeline in float32 to share, got {network.dtype}")
    sha256 = model_sha256(pipeline)
    if evaluation and not is_of(evaluation, sha256):
        raise ValueError(f"evaluation: {evaluation} holds no evaluation of this very model; run ldm evaluate")
    save_weights(pipeline, folder)
    told, run = None, {"config": config, "step": None}
    if evaluation:
        told = report.read(evaluation / report.FILE)
        if (evaluation / run_record.FILE).exists():
            run = report.read(evaluation / run_record.FILE)
            run["config"] = config or run["config"]
    clean = partial(without_places, known=known_places(told, run["config"]))
    if evaluation:
        told = clean(told)
        (folder / report.FILE).write_text(json.dumps(told, indent=2, ensure_ascii=False) + "\n", "utf-8")
        (folder / report.PAGE).write_text(report.render(evaluation, clean), "utf-8")
        plot_loss(told, folder / LOSS)
    card = model_card(pipeline, repo_id, terms, sha256, draw_gallery(pipeline, folder, sha256), told, clean(run))
    (folder / "README.md").write_text(card, "utf-8")


def networks(pipeline: Any) -> Iterator[tuple[str, Any]]:
    """Name and network of what a pipeline computes with."""
    for name in ("unet", "vae", "text_encoder"):
        if (network := getattr(pipeline, name)) is not None:
            yield name, network


def save_weights(pipeline: Any, folder: Path) -> None:
    """The pipeline and its fp16 variant, under the names that diffusers and transformers look for."""
    pipeline.save_pretrained(folder, max_shard_size=SHARD)
    for name, network in networks(pipeline):  # the variant second: saving the whole deletes what looks like its shards
        config = (folder / name / "config.json").read_bytes()
        half = copy.deepcopy(network).half()
        half.save_pretrained(folder / name, variant="fp16", max_shard_size=SHARD)
        (folder / name / "config.json").write_bytes(config)  # one for both, of float32


def known_places(told: dict[str, Any] | None, config: dict[str, Any] | None) -> list[Any]:
    """The folders whose names are told, and what lies below them: the run's and the data's."""
    places: list[Any] = []
    if told:
        model = Path(told["model"]["folder"])
        places += [model.parent if model.name == "pipeline" else model, told["data"]["source"]]
    if config:
        places += [config.get("run"), config.get("data", {}).get("source")]
    return [str(place) for place in places if place]


def draw_gallery(pipeline: Any, folder: Path, sha256: str) -> list[Drawn]:
    """Draw what the model is known by, a file for each, and gallery.png with all of them; nobody picks."""
    asked: list[dict[str, str]] = []
    if pipeline.tokenizer is not None:
        asked = [{"prompt": prompt} for prompt in pipeline.example_prompts]
    elif pipeline.labels:
        asked = [{"class_label": name} for name in pipeline.labels.names]
    elif not pipeline.condition_channels:
        asked = [{}] * SHOWN
    pictures: list[Image.Image] = []
    drawn: list[Drawn] = []
    bar = dict(getattr(pipeline, "_progress_bar_config", {}))
    pipeline.set_progress_bar_config(disable=True)  # there is one over all pictures
    for seed, words in enumerate(tqdm(asked[:SHOWN], desc="drawing for the card", unit="picture")):
        (picture,) = pipeline(**words, seed=seed).images
        recipe.stamp([picture], pipeline, sha256, seed=seed, **words)
        file = f"pictures/{seed}.png"
        recipe.save(picture, folder / file)
        pictures.append(picture)
        drawn.append(Drawn(next(iter(words.values()), ""), file))
    pipeline.set_progress_bar_config(**bar)
    if pictures:
        captioned_grid(pictures, [one.words for one in drawn], edge=192).save(folder / GALLERY)
    return drawn


def plot_loss(told: dict[str, Any], path: Path) -> None:
    """The held-out loss by quarter of t, with each kind of caption."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    figure = Figure(figsize=(6, 3.2), layout="constrained")
    panel = figure.subplots()
    use = told["text_use"]
    for kind, name in report_charts.CAPTIONS.items():
        if losses := use["losses"].get(kind):
            values = [losses[quarter] for quarter in report_charts.QUARTERS]
            panel.plot(list(report_charts.LEGEND.values()), values, marker="o", label=name)
    panel.set(
        xlabel="quarter of t", ylabel=f"{use['on'].replace('heldout', 'held-out')} loss (n = {use['n']})", yscale="log"
    )
    panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    panel.yaxis.set_minor_locator(NullLocator())
    panel.grid(alpha=0.3)
    panel.legend(frameon=False)
    figure.savefig(path, dpi=120)


def is_of(folder: Path, sha256: str) -> bool:
    """Whether the folder holds an evaluation of the model with this hash."""
    path = folder / report.FILE
    return path.exists() and report.read(path)["model"]["sha256"] == sha256


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
    """Upload what `write_model` writes, in one commit; returns the repository's address."""
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
