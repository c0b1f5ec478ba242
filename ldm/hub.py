"""A model to share: the folder that goes to the Hub, with weights, a card that says what it is, and the proof."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from ldm import recipe
from ldm.evaluation import report, report_charts
from ldm.grid import captioned_grid
from ldm.hub_card import Terms, model_card
from ldm.models.fingerprint import model_sha256

SHOWN = 8  # pictures on the card


def write_model(
    pipeline: Any,
    folder: Path,
    repo_id: str,
    terms: Terms,
    evaluation: Path | None = None,
    config: dict[str, Any] | None = None,
) -> None:
    """Write into an empty folder exactly what is uploaded.

    Args:
        pipeline: an LDMPipeline in float32.
        repo_id: user/name.
        evaluation: a folder that `ldm evaluate` wrote of this very model; others are left out by the caller.
        config: of the run, for the card.
    Raises:
        ValueError: if the folder holds anything.
    """
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder}: expected an empty folder or none; it would be mixed with what is there")
    folder.mkdir(parents=True, exist_ok=True)
    pipeline.save_pretrained(folder)
    for weights in sorted(folder.glob("*/*.safetensors")):
        write_half(weights)
    told: dict[str, Any] | None = None
    if evaluation:
        told = report.read(evaluation / report.FILE)
        assert told is not None
        report.write_report(evaluation)
        for name in (report.FILE, report.PAGE):
            (folder / name).write_bytes((evaluation / name).read_bytes())
        plot_loss(told, folder / "loss_by_t.png")
    sha256 = model_sha256(pipeline)
    drawn = draw_gallery(pipeline, folder, sha256)
    card = model_card(pipeline, repo_id, terms, sha256, drawn, told, config)
    (folder / "README.md").write_text(card, "utf-8")


def write_half(weights: Path) -> None:
    """Beside a weights file its fp16 variant, under the name that diffusers and transformers look for."""
    with safe_open(weights, "pt") as opened:
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        metadata = opened.metadata()
    half = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
    save_file(half, weights.with_suffix(".fp16.safetensors"), metadata=metadata)


def draw_gallery(pipeline: Any, folder: Path, sha256: str) -> list[tuple[str, str]]:
    """Draw what the model is known by; (prompt, file) of each picture, besides gallery.png with all of them."""
    pictures, drawn = [], []
    for seed, prompt in enumerate(pipeline.example_prompts[:SHOWN]):
        (picture,) = pipeline(prompt, seed=seed).images
        recipe.stamp([picture], pipeline, sha256, prompt=prompt, seed=seed)
        recipe.save(picture, folder / f"pictures/{seed}.png")
        pictures.append(picture)
        drawn.append((prompt, f"pictures/{seed}.png"))
    if pictures:
        captioned_grid(pictures, [prompt for prompt, _ in drawn], edge=192).save(folder / "gallery.png")
    return drawn


def plot_loss(told: dict[str, Any], path: Path) -> None:
    """The held-out loss by quarter of t, with each kind of caption."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.2), layout="constrained")
    panel = figure.subplots()
    for kind, name in report_charts.CAPTIONS.items():
        if losses := told["text_use"]["losses"].get(kind):
            values = [losses[quarter] for quarter in report_charts.QUARTERS]
            panel.plot(list(report_charts.LEGEND.values()), values, marker="o", label=name)
    panel.set(xlabel="quarter of t", ylabel="held-out loss", yscale="log")
    panel.grid(alpha=0.3)
    panel.legend(frameon=False)
    figure.savefig(path, dpi=120)


def evaluation_of(pipeline: Any, folder: Path) -> Path | None:
    """The folder, if it holds an evaluation of this very model."""
    path = folder / report.FILE
    return folder if path.exists() and report.read(path)["model"]["sha256"] == model_sha256(pipeline) else None


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
    """Upload what `write_model` writes; returns the repository's address.

    Raises:
        ValueError: if the pipeline isn't in float32, of which the fp16 variant is made.
    """
    from huggingface_hub import HfApi

    if pipeline.unet.dtype != torch.float32:
        raise ValueError(f"push: expected a pipeline in float32, got {pipeline.unet.dtype}")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        write_model(pipeline, folder, repo_id, terms, evaluation, config)
        api = HfApi(token=token)
        address = api.create_repo(repo_id, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=repo_id, folder_path=folder, commit_message=commit_message, create_pr=create_pr
        )  # fmt: skip
    return str(address)
