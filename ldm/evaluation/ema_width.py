"""Which width of the average is best? Tried after training, on averages rebuilt from a run's snapshots.

Every width is measured on the same held-out pictures at the same (t, eps), so differences are paired. Where there is a
feature extractor, pictures are generated as well and have the last word: the width with the smallest validation loss
is often narrower than the one with the best pictures.

    1. KID     within one standard error of the smallest, if there is an extractor
    2. loss    the smallest of the remaining ones
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from ldm.data.dataset import CaptionedPictures
from ldm.evaluation.evaluate import require_packages, write
from ldm.evaluation.evaluated_model import EvaluatedModel, SamplingSettings
from ldm.evaluation.evaluation_set import EvaluationSet
from ldm.evaluation.features import FeatureExtractor, extract_features, in_batches, read_pixels
from ldm.evaluation.metrics.distribution import kid_estimate
from ldm.evaluation.metrics.intervals import RESAMPLES, paired_estimate
from ldm.evaluation.report.charts import Series, line_chart, save_png
from ldm.evaluation.sections import validation_set
from ldm.evaluation.validation import squared_errors

FILE, CHART = "ema.json", "ema.png"


def widths_between(low: float, high: float, count: int) -> list[float]:
    """So many widths from low to high, at equal ratios, to three digits."""
    if count == 1 or low == high:
        return [low]
    return [float(f"{low * (high / low) ** (i / (count - 1)):.3g}") for i in range(count)]


def try_widths(
    load: Callable[[float], tuple[EvaluatedModel, float]],
    widths: Sequence[float],
    pictures: CaptionedPictures,
    extractors: Callable[[EvaluatedModel], Sequence[FeatureExtractor]],
    settings: SamplingSettings,
    out: Path,
    *,
    most: int | None = None,
    batch_size: int = 16,
) -> dict[str, Any]:
    """Measure the average of each width; writes OUT/ema.json and OUT/ema.png.

    Args:
        load: width => the model with that average, and how much of its profile the snapshots miss.
        extractors: of features, pixels first; the last one decides, if it is a network.
        settings: of generated pictures.
        most: held-out captions, spread evenly; None is all.
    Returns:
        The content of ema.json: a row a width, and the best width.
    Raises:
        ValueError: without held-out pictures.
    """
    require_packages()
    rows: list[dict[str, Any]] = []
    losses = []
    for width in widths:
        model, left = load(width)
        if not rows:
            data = EvaluationSet(pictures, model.size)
            prompts = data.prompts("heldout", most)
            if not len(prompts):
                raise ValueError(
                    f"--ema: {pictures.source} has no held-out pictures; set --holdout as it was in training"
                )
            fixed = validation_set(model, data, prompts, torch.Generator().manual_seed(settings.seed))
            extractor = list(extractors(model))[-1]
            real = data.features([extractor], out / "features") if extractor.sha256 else None
        row: dict[str, Any] = {"width": width, "left": left}
        losses.append(squared_errors(model.network, model.schedule, model.prediction, fixed).mean(0))  # (n,)
        if real is not None:
            paths = model.generate_all(prompts, settings, out, batch_size)
            found = extract_features([extractor], map(read_pixels, in_batches(paths)))[extractor.name]
            row["kid"] = kid_estimate(found, real[extractor.name][data.reference([prompts])], RESAMPLES)
        rows.append(row | {"loss": float(losses[-1].mean())})
    best = choose(rows)
    for row, loss in zip(rows, losses, strict=True):
        row["more_than_best"] = paired_estimate(losses[best], loss)
    report = {"rows": rows, "best": rows[best]["width"], "on": len(prompts), "seed": settings.seed,
              "space": extractor.name if real is not None else None}  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    write(report, out / FILE)
    save_png(chart(rows), out / CHART)
    return report


def choose(rows: Sequence[dict[str, Any]]) -> int:
    """The index of the best row, by the two rules."""
    limit = math.inf
    if "kid" in rows[0]:
        smallest = min((row["kid"] for row in rows), key=lambda kid: kid["value"])
        limit = smallest["value"] + smallest["standard_error"]
    remaining = [i for i, row in enumerate(rows) if "kid" not in row or row["kid"]["value"] <= limit]
    return min(remaining, key=lambda i: rows[i]["loss"])


def table(report: dict[str, Any]) -> str:
    """The rows as text; the best is marked."""
    lines = ["   width   loss      more than the best, 95 % interval     missed"]
    if report["space"]:
        lines[0] += "   KID"
    for row in report["rows"]:
        more, mark = row["more_than_best"], "*" if row["width"] == report["best"] else " "
        line = (
            f" {mark} {row['width']:<7g} {row['loss']:.5f}   {more['value']:+.5f}  "
            f"{more['low']:+.5f} to {more['high']:+.5f}   {row['left']:9.2%}"
        )
        lines.append(line + (f"   {row['kid']['value']:.4f}" if "kid" in row else ""))
    return "\n".join(lines)


def chart(rows: Sequence[dict[str, Any]]) -> Any:
    """The validation loss over the width; the bars are of the difference to the best."""
    points = [(row["width"], row["loss"]) for row in rows]
    errors = [(row["more_than_best"]["high"] - row["more_than_best"]["low"]) / 2 for row in rows]
    return line_chart(
        [Series("validation loss", points, errors)], x="width of the average", y="validation loss", log_x=len(rows) > 1
    )
