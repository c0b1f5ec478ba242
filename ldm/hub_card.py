"""The card of a shared model: README.md with YAML for the Hub, and words, pictures and figures for people."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2


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


def figures(told: dict[str, Any], data: str) -> Iterator[Any]:
    """All figures of an evaluation that have an interval, as the Hub's model-index holds them."""
    from huggingface_hub import EvalResult

    nets = {space["name"]: space["sha256"] for space in told["spaces"]}

    def result(kind: str, name: str, split: str, found: dict[str, Any], **more: Any) -> Any:
        args = {"n": found["n"], "low": found["low"], "high": found["high"], **more}
        return EvalResult(
            task_type="text-to-image", dataset_type="captioned-pictures", dataset_name=data, dataset_split=split,
            metric_type=kind, metric_name=name, metric_value=found["value"], metric_args=args,
        )  # fmt: skip

    for split, retrieved in told["retrieval"].items():
        for who in ("drawn", "ceiling"):
            for space, found in retrieved[who].items():
                for part in ("", "compositions", "others"):
                    some = found.get(part) if part else found
                    for top in ("top1", "top5") if some else ():
                        words = f"Retrieval {top} in {space}, {who}{', ' + part if part else ''}"
                        chance = found["chance"][top]
                        judge = {"space": space, "space_sha256": nets[space]}
                        yield result(f"retrieval_{top}", words, split, some[top], chance=chance, **judge)
    for space, found in told["distribution"].items():
        for who in ("drawn", "floor"):
            for kind, one in found[who].items():
                name = f"{kind.upper() if kind in ('fid', 'kid') else kind.capitalize()} in {space}, {who}"
                reference = {"reference_n": found["reference_n"], "space": space, "space_sha256": nets[space]}
                yield result(kind, name, found["on"], one, **reference)
    for split, spaces in told["text_fit"].items():
        for space, found in spaces.items():
            for who, one in found.items():
                if one:
                    yield result("clip_score", f"CLIP score in {space}, {who}", split, one, space=space)
    for kind, gap in told["text_use"]["gaps"].items():
        for part, one in gap.items():
            yield result("text_gap", f"Loss more with {kind} captions, {part}", told["text_use"]["on"], one)
    for space, sets in told["memorization"].items():
        for split, found in sets.items():
            for who, one in found["near_copies"].items():
                name = f"Near-copies in {space}, {who}"
                yield result("near_copies", name, split, one, verdict=found["verdict"], space=space)
    for split, found in told["reconstruction"].items():
        yield result("psnr", "PSNR of reconstructions, dB", split, found["psnr_db"])


def model_card(
    pipeline: Any,
    repo_id: str,
    terms: Terms,
    sha256: str,
    drawn: list[tuple[str, str]],
    told: dict[str, Any] | None,
    config: dict[str, Any] | None,
) -> str:
    """README.md: YAML for the Hub, words and pictures for people."""
    from huggingface_hub import ModelCardData

    name = repo_id.split("/")[-1]
    measured = list(figures(told, terms.data)) if told else []
    data = ModelCardData(
        license=terms.license,
        library_name="diffusers",
        pipeline_tag="text-to-image" if pipeline.tokenizer is not None else "unconditional-image-generation",
        tags=["latent-diffusion", "ldm"],
        model_name=name,
        eval_results=measured or None,
        training_data=terms.data,
        training_data_license=terms.data_license,
        **({"widget": [{"text": prompt, "output": {"url": file}} for prompt, file in drawn]} if drawn else {}),
    )
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    prompts = pipeline.example_prompts or ("a picture",)
    body = environment.get_template("model_card.md").render(
        name=name,
        repo_id=repo_id,
        terms=terms,
        size=pipeline.edge("height"),
        parameters=sum(weight.numel() for weight in pipeline.unet.parameters()),
        gallery="gallery.png" if drawn else "",
        defaults=pipeline.defaults,
        prompt=json.dumps(prompts[0], ensure_ascii=False),
        nothing="" if pipeline.tokenizer is not None else ", text_encoder=None, tokenizer=None",
        figures=measured,
        evaluation=told,
        loss="loss_by_t.png" if told else "",
        sha256=sha256,
        config=json.dumps(config, indent=2, ensure_ascii=False) if config else "",
    )
    return f"---\n{data.to_yaml()}\n---\n\n{body}\n"
