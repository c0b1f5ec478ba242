"""The card of a shared model: README.md with YAML for the Hub, and words, pictures and figures for people."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from ldm.sharing.figures import figures, headline, limits


@dataclass(frozen=True)
class Terms:
    """What nobody but the owner can say.

    Attributes:
        license: of the weights, as the Hub spells it: cc-by-sa-4.0, apache-2.0, …
        data: what the model was trained on, in words.
        data_license: of these data.
    """

    license: str
    data: str
    data_license: str

    def __post_init__(self) -> None:
        for name in ("license", "data", "data_license"):
            if not getattr(self, name).strip():
                raise ValueError(f"{name}: expected some words, got nothing; it is never guessed")


@dataclass(frozen=True)
class Drawn:
    """A picture on the card: the words it was drawn from (none for a model that is told nothing) and its file."""

    words: str
    file: str


def model_card(
    pipeline: Any,
    repo_id: str,
    terms: Terms,
    sha256: str,
    drawn: list[Drawn],
    told: dict[str, Any] | None,
    run: dict[str, Any],
) -> str:
    """README.md: YAML for the Hub, words and pictures for people.

    Args:
        drawn: pictures, and besides them gallery.png.
        told: evaluation.json, beside report.html and loss_by_t.png.
        run: {"config": …, "step": …}, both None where they aren't known.
    """
    from huggingface_hub import ModelCardData

    name = repo_id.split("/")[-1]
    measured = list(figures(told, terms.data)) if told else []
    widget = [{"text": one.words, "output": {"url": one.file}} for one in drawn if pipeline.tokenizer is not None]
    data = ModelCardData(
        license=terms.license,
        library_name="diffusers",
        pipeline_tag=pipeline_tag(pipeline),
        tags=["latent-diffusion", "ldm"],
        model_name=name,
        eval_results=measured or None,
        training_data=terms.data,
        training_data_license=terms.data_license,
        **({"widget": widget} if widget else {}),
    )
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    size = pipeline.edge("height")
    body = environment.get_template("model_card.md").render(
        name=name,
        repo_id=repo_id,
        terms=terms,
        size=size,
        parameters={part: count(getattr(pipeline, part)) for part in ("unet", "vae", "text_encoder")},
        text_encoder=((run["config"] or {}).get("text") or {}).get("encoder"),
        drawn=drawn,
        defaults=pipeline.defaults,
        stock=pipeline.labels is None and not pipeline.condition_channels,
        call=call(pipeline),
        nothing="" if pipeline.tokenizer is not None else ", text_encoder=None, tokenizer=None",
        headline=list(headline(told)) if told else [],
        limits=list(limits(told, size)),
        figures=measured,
        evaluation=told,
        sha256=sha256,
        step=run["step"],
        config=json.dumps(run["config"], indent=2, ensure_ascii=False) if run["config"] else "",
    )
    return f"---\n{data.to_yaml()}\n---\n\n{body}\n"


def count(network: Any) -> str:
    """Its parameters, in millions."""
    return "" if network is None else f"{sum(weight.numel() for weight in network.parameters()) / 1e6:.1f}"


def pipeline_tag(pipeline: Any) -> str:
    """The Hub's name of what it does."""
    if pipeline.condition_channels:
        return "image-to-image"
    return "text-to-image" if pipeline.tokenizer is not None else "unconditional-image-generation"


def call(pipeline: Any) -> str:
    """The first arguments of a call, as Python."""
    words = []
    if pipeline.tokenizer is not None:
        words.append(json.dumps((pipeline.example_prompts or ("a picture",))[0], ensure_ascii=False))
    if pipeline.labels:
        words.append(f"class_label={json.dumps(pipeline.labels.names[0], ensure_ascii=False)}")
    if pipeline.condition_channels:
        words.append('condition=Image.open("sketch.png")')
    return ", ".join(words)
