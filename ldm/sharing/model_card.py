"""The card of a shared model: README.md, with YAML for the Hub, and text, pictures and metrics for people."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from ldm.evaluation.report.text import SPLITS, kinds_of, number, percent, sampling, signed

FEW = 100  # pictures; metrics of fewer are rough
KINDS = {"drawn": "generated", "floor": "baseline", "ceiling": "upper bound", "heldout": "held-out"}


@dataclass(frozen=True)
class Terms:
    """Facts that only the owner knows.

    Attributes:
        license: of the weights, as the Hub spells it: cc-by-sa-4.0, apache-2.0, …
        data: a description of the training data.
        data_license: of these data.
    """

    license: str
    data: str
    data_license: str

    def __post_init__(self) -> None:
        for name in ("license", "data", "data_license"):
            if not getattr(self, name).strip():
                raise ValueError(f"{name}: expected text, got nothing; it is never guessed")


@dataclass(frozen=True)
class Example:
    """A generated picture on the card: its prompt or class ("" for an unconditional model) and its file."""

    prompt: str
    file: str


def model_card(
    pipeline: Any,
    repo_id: str,
    terms: Terms,
    sha256: str,
    examples: list[Example],
    evaluation: dict[str, Any] | None,
    run: dict[str, Any],
) -> str:
    """README.md: YAML for the Hub, text and pictures for people.

    Args:
        examples: pictures; gallery.png shows all of them.
        evaluation: evaluation.json, if report.html and loss_by_t.png are in the folder.
        run: {"config": …, "step": …}, both None if unknown.
    """
    from huggingface_hub import ModelCardData

    name = repo_id.split("/")[-1]
    results = list(eval_results(evaluation, terms.data)) if evaluation else []
    widget = [{"text": one.prompt, "output": {"url": one.file}} for one in examples if pipeline.tokenizer is not None]
    data = ModelCardData(
        license=terms.license,
        library_name="diffusers",
        pipeline_tag=pipeline_tag(pipeline),
        tags=["latent-diffusion", "ldm"],
        model_name=name,
        eval_results=results or None,
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
        parameters={part: millions(getattr(pipeline, part)) for part in ("unet", "vae", "text_encoder")},
        text_encoder=((run["config"] or {}).get("text") or {}).get("encoder"),
        examples=examples,
        defaults=pipeline.defaults,
        sampling=sampling,
        large=size * pipeline.upscaler.factor if pipeline.has_upscaler else 0,
        student=pipeline.student.defaults.num_inference_steps if pipeline.has_student else 0,
        stock=pipeline.labels is None and pipeline.numbers is None and not pipeline.extra_channels,
        call=example_call(pipeline),
        nothing="" if pipeline.tokenizer is not None else ", text_encoder=None, tokenizer=None",
        headline=list(headline(evaluation)) if evaluation else [],
        limits=list(limits(evaluation, size)),
        results=results,
        evaluation=evaluation,
        sha256=sha256,
        step=run["step"],
        config=json.dumps(run["config"], indent=2, ensure_ascii=False) if run["config"] else "",
    )
    return f"---\n{data.to_yaml()}\n---\n\n{body}\n"


def millions(network: Any) -> str:
    """A network's parameters, in millions; "" for None."""
    return "" if network is None else f"{sum(weight.numel() for weight in network.parameters()) / 1e6:.1f}"


def pipeline_tag(pipeline: Any) -> str:
    """The Hub's name of the model's task."""
    if pipeline.extra_channels:
        return "image-to-image"
    return "text-to-image" if pipeline.tokenizer is not None else "unconditional-image-generation"


def example_call(pipeline: Any) -> str:
    """The first arguments of a call, in Python."""
    arguments = []
    if pipeline.tokenizer is not None:
        arguments.append(json.dumps((pipeline.example_prompts or ("a picture",))[0], ensure_ascii=False))
    if pipeline.labels:
        arguments.append(f"class_label={json.dumps(pipeline.labels.names[0], ensure_ascii=False)}")
    if pipeline.numbers:
        typical = {name: round(mean, 3) for name, mean in zip(pipeline.numbers.columns, pipeline.numbers.mean)}
        arguments.append(f"numbers={json.dumps(typical, ensure_ascii=False)}")
    if pipeline.condition_channels:
        arguments.append('condition=Image.open("sketch.png")')
    if pipeline.inpaints:
        arguments.append('image=Image.open("picture.png"), mask_image=Image.open("mask.png")')
    return ", ".join(arguments)


def eval_results(evaluation: dict[str, Any], data: str) -> Iterator[Any]:
    """All estimates of an evaluation that have a confidence interval, for the Hub's model-index."""
    from huggingface_hub import EvalResult

    weights = {extractor["name"]: extractor["sha256"] for extractor in evaluation["spaces"]}

    def result(metric: str, name: str, split: str, estimate: dict[str, Any], **more: Any) -> Any:
        args = {"n": estimate["n"], "low": estimate["low"], "high": estimate["high"], **more}
        return EvalResult(
            task_type="text-to-image", dataset_type="captioned-pictures", dataset_name=data, dataset_split=split,
            metric_type=metric, metric_name=name, metric_value=estimate["value"], metric_args=args,
        )  # fmt: skip

    for split, retrieval in evaluation["retrieval"].items():
        for kind in ("drawn", "ceiling"):
            for features, found in retrieval[kind].items():
                for part in ("", *kinds_of(found)):
                    recall = found[part] if part else found
                    for top in ("top1", "top5"):
                        suffix = f", {part}" if part else ""
                        name = f"Retrieval {top}, {features} features, {KINDS[kind]}{suffix}"
                        args = {"chance": found["chance"][top], "features": features}
                        yield result(
                            f"retrieval_{top}", name, split, recall[top], **args, features_sha256=weights[features]
                        )
    for features, found in evaluation["distribution"].items():
        for kind in ("drawn", "floor"):
            for metric, estimate in found[kind].items():
                title = metric.upper() if metric in ("fid", "kid") else metric.capitalize()
                args = {"reference_n": found["reference_n"], "features": features, "features_sha256": weights[features]}
                yield result(metric, f"{title}, {features} features, {KINDS[kind]}", found["on"], estimate, **args)
    for split, extractors in evaluation["text_fit"].items():
        for features, scores in extractors.items():
            for kind, estimate in scores.items():
                if estimate:
                    name = f"CLIP score, {features}, {KINDS.get(kind, kind)}"
                    yield result("clip_score", name, split, estimate, features=features)
    for kind, gap in evaluation["text_use"]["gaps"].items():
        for part, estimate in gap.items():
            yield result("text_gap", f"Loss increase, {kind} captions, {part}", evaluation["text_use"]["on"], estimate)
    for features, sets in evaluation["memorization"].items():
        for split, found in sets.items():
            for kind, estimate in found["near_copies"].items():
                name = f"Near-copies, {features} features, {KINDS[kind]}"
                yield result("near_copies", name, split, estimate, verdict=found["verdict"], features=features)
    for split, found in evaluation["reconstruction"].items():
        yield result("psnr", "PSNR of the autoencoder, dB", split, found["psnr_db"])


@dataclass(frozen=True)
class Row:
    """A row of the card's table: a metric, its value with interval and n, and what to compare it with."""

    metric: str
    value: str
    interval: str
    n: int
    compare: str


def row(metric: str, estimate: dict[str, Any], write: Any, compare: str = "") -> Row:
    """A row whose numbers are written by `write`."""
    interval = f"{write(estimate['low'])} to {write(estimate['high'])}"
    return Row(metric, write(estimate["value"]), interval, estimate["n"], compare)


def headline(evaluation: dict[str, Any]) -> Iterator[Row]:
    """The main metrics, with the features of the last extractor: a network if there is one, else pixels."""
    features = evaluation["spaces"][-1]["name"]
    for split in sorted(evaluation["retrieval"]):
        found, bound = (evaluation["retrieval"][split][kind][features] for kind in ("drawn", "ceiling"))
        compare = f"autoencoder {percent(bound['top5']['value'])}, chance {percent(found['chance']['top5'])}"
        name = f"Prompt retrieval, top 5 of {found['candidates']:,}, {SPLITS[split]}"
        yield row(name, found["top5"], percent, compare)
    if "shuffled" in evaluation["text_use"]["gaps"]:
        use = evaluation["text_use"]
        compare = f"loss with true captions {number(use['losses']['true']['total'])}"
        yield row("Shuffled-caption gap of the loss", use["gaps"]["shuffled"]["total"], signed, compare)
    if found := evaluation["distribution"].get(features):
        for metric in ("fid", "kid"):
            real = "real held-out pictures" if found["on"] == "heldout" else "real pictures"
            compare = f"{real} {number(found['floor'][metric]['value'])}"
            yield row(f"{metric.upper()}, lower is better", found["drawn"][metric], number, compare)
    for split, found in sorted(evaluation["memorization"].get(features, {}).items()):
        near = found["near_copies"]
        compare = f"real held-out pictures {percent(near['heldout']['value'])}"
        yield row(f"Near-copies of training pictures, {SPLITS[split]}", near["drawn"], percent, compare)
    for split, found in sorted(evaluation["reconstruction"].items()):
        yield row(f"PSNR of the autoencoder in dB, {SPLITS[split]}", found["psnr_db"], number)


def limits(evaluation: dict[str, Any] | None, size: int) -> Iterator[str]:
    """Known limits of the model, as far as they were measured."""
    yield f"It was trained only on the data named below, at {size} × {size} pixels."
    yield "It has no safety checker: neither prompts nor pictures are filtered."
    if evaluation is None:
        yield "It has not been evaluated: picture quality, prompt fidelity and memorization are unknown."
        return
    gap = evaluation["text_use"]["gaps"].get("shuffled", {}).get("total")
    if gap and gap["low"] <= 0:
        interval = f"{signed(gap['value'])} ({signed(gap['low'])} to {signed(gap['high'])})"
        yield f"It is not shown to use captions: shuffled captions change the loss by {interval}, which may be zero."
    features = evaluation["spaces"][-1]["name"]
    top5 = {split: found["drawn"][features]["top5"] for split, found in evaluation["retrieval"].items()}
    if len(top5) == 2 and top5["heldout"]["high"] < top5["train"]["low"]:
        shares = f"{percent(top5['heldout']['value'])} against {percent(top5['train']['value'])}"
        yield f"It follows captions outside the training data less often: top-5 retrieval {shares}."
    for name, sets in evaluation["memorization"].items():
        for split, found in sorted(sets.items()):
            if found["verdict"] in ("copies", "some copies"):
                generated, real = (percent(found["near_copies"][kind]["value"]) for kind in ("drawn", "heldout"))
                yield (
                    f"It copies training pictures ({SPLITS[split]}, {name} features: {found['verdict']}): "
                    f"{generated} are near-copies, of real held-out pictures {real}."
                )
    least = min(found["n"] for found in top5.values())
    if least < FEW:
        yield f"The metrics are rough: some are of {least} pictures. Mind the confidence intervals."
    if evaluation["distribution"]:
        yield "FID and KID depend on the feature extractor and on n: compare them only with those of real pictures."
