"""The quality of each arm's pictures: the error to its limit and, with data, retrieval and KID.

The limit of an arm is the picture from the same noise with so many steps that more change nothing. The distance to it
is the error of few steps or a short number format, for any weights. For a trained model with its data set, every arm
generates the same captions, and retrieval and KID are measured with pixel features and a network.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.pipelines import Arm
from ldm.evaluation.metrics.intervals import RESAMPLES, mean_estimate

BATCH = 8
GRAY = 127.5  # levels in a unit of pixels


def generate_all(arm: Arm, captions: Sequence[str], **arguments: Any) -> Tensor:
    """Pixels [N,3,H,W] of all captions, in batches; picture i starts from the noise of seed i."""
    parts = []
    with tqdm(
        total=len(captions), desc=f"generating: {arm.name} {arguments or ''}", unit="picture", leave=False
    ) as bar:
        for start in range(0, len(captions), BATCH):
            part = captions[start : start + BATCH]
            parts.append(arm.pixels(part, first_seed=start, **arguments))
            bar.update(len(part))
    return torch.cat(parts)


def errors(generated: Tensor, limit: Tensor) -> Tensor:
    """The root mean square difference of each picture to its limit, in gray levels of 255, float64 [N]."""
    return ((generated - limit).double() * GRAY).square().mean((1, 2, 3)).sqrt()


def limits(ours: Arm, stock: Arm, captions: Sequence[str], steps: int) -> tuple[Tensor, Tensor]:
    """The limits of ours and of stock, from float32 arms; the same pictures if both integrate the same process."""
    theirs = generate_all(stock, captions, num_inference_steps=steps)
    few = {"num_inference_steps": 5}
    if (errors(generate_all(ours, captions[:1], **few), generate_all(stock, captions[:1], **few)) < 0.01).all():
        return theirs, theirs
    return generate_all(ours, captions, num_inference_steps=steps), theirs


@dataclass(frozen=True)
class SampleEvaluator:
    """Real pictures, prompts and feature extractors."""

    data: Any
    prompts: Any
    extractors: Sequence[Any]
    real: dict[str, Tensor]

    @classmethod
    def of(cls, chosen: argparse.Namespace, size: int, cache: Path) -> SampleEvaluator:
        """From the options of benchmarks/sampling.py; `cache` keeps the real pictures' features."""
        from ldm.data.dataset import read_captioned
        from ldm.evaluation.evaluation_set import EvaluationSet
        from ldm.evaluation.features import load_extractor, pixel_extractor
        from ldm.evaluation.in_domain_clip import load_clip, read_card

        pictures = read_captioned(chosen.data, holdout=chosen.holdout)
        data = EvaluationSet(pictures, size)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        extractors = [pixel_extractor(size), *(load_extractor(spec, size, device) for spec in chosen.features)]
        if read_card(chosen.net) is not None:
            extractors.append(load_clip(chosen.net, pictures, size, device))
        prompts = data.prompts(chosen.split, chosen.pictures)
        return cls(data, prompts, extractors, data.features(extractors, cache))

    def evaluate(self, pixels: Tensor) -> dict[str, Any]:
        """By feature extractor: retrieval and KID, and whether each prompt is a top-1 hit, float64 [N]."""
        from ldm.evaluation import sections
        from ldm.evaluation.features import extract_features
        from ldm.evaluation.metrics.distribution import kid_estimate

        generated = extract_features(self.extractors, pixels.split(BATCH))
        found, ranks = sections.retrieval(self.extractors, self.data, self.real, generated, self.prompts)
        reference = self.data.reference([self.prompts])
        for name, vectors in generated.items():
            found[name]["kid"] = kid_estimate(vectors, self.real[name][reference], RESAMPLES)
        return {"features": found, "hits": {name: (rank == 1).double() for name, rank in ranks.items()}}


def compare_quality(arms: Sequence[Arm], float32: tuple[Arm, Arm], captions: Sequence[str], steps: int,
                    evaluator: SampleEvaluator | None, grids: Path) -> list[dict[str, Any]]:  # fmt: skip
    """The quality of each arm's pictures of these captions; the first arm is ours, the others are compared with it.

    Args:
        float32: ours and stock in float32, which make the limits.
        steps: of the limits.
        grids: a folder for grids of pictures.
    """
    from ldm.data.grid import captioned_grid
    from ldm.models.vae import to_pictures

    our_limit, stock_limit = limits(*float32, captions, steps)
    rows: list[dict[str, Any]] = []
    values: list[dict[str, Tensor]] = []  # of each arm, by metric: one value for each caption
    for i, arm in enumerate(arms):
        arm.rows = 0
        generated = generate_all(arm, captions)
        row: dict[str, Any] = {"arm": arm.name, "unet_rows_per_picture": arm.rows / len(captions)}
        values.append({"error": errors(generated, our_limit if i == 0 else stock_limit)})
        row["error"] = mean_estimate(values[i]["error"])
        if evaluator is not None:
            found = evaluator.evaluate(generated)
            row["features"] = found["features"]
            values[i] |= {f"top-1, {name}": hits for name, hits in found["hits"].items()}
        if i > 0:
            row["ours_minus_it"] = {name: mean_estimate(values[0][name] - its) for name, its in values[i].items()}
            row["ours_is_worse_in"] = worse(rows[0], row)
        rows.append(row)
        grids.mkdir(parents=True, exist_ok=True)
        few = slice(0, 16)
        path = grids / f"sampling-{arm.name.replace(' ', '-')}.png"
        captioned_grid(to_pictures(generated[few]), captions[few]).save(path)
    return rows


def worse(ours: dict[str, Any], row: dict[str, Any]) -> list[str]:
    """The metrics in which ours is significantly worse: the difference's interval excludes 0, or KIDs' are disjoint."""
    found = [
        name
        for name, difference in row["ours_minus_it"].items()
        if (difference["low"] > 0 if name == "error" else difference["high"] < 0)
    ]
    for name, metrics in row.get("features", {}).items():
        if ours["features"][name]["kid"]["low"] > metrics["kid"]["high"]:
            found.append(f"KID, {name}")
    return found


def quality_table(rows: Sequence[dict[str, Any]]) -> str:
    """One line per arm."""

    def cell(estimate: dict[str, Any], form: str = ".2f") -> str:
        return f"{estimate['value']:{form}} ({estimate['low']:{form}} to {estimate['high']:{form}})"

    extractors = list(rows[0].get("features", {}))
    lines = [["arm", "U-Net rows", "error, gray levels", "ours is worse in"]]
    lines[0] += [f"{metric}, {name}" for name in extractors for metric in ("top-1", "top-5", "KID")]
    lines.append(["---"] * len(lines[0]))
    for i, row in enumerate(rows):
        losses = ", ".join(row["ours_is_worse_in"]) or "nothing" if i else ""
        line = [row["arm"], f"{row['unet_rows_per_picture']:g}", cell(row["error"]), losses]
        for metrics in row.get("features", {}).values():
            line += [cell(metrics["top1"]), cell(metrics["top5"]), cell(metrics["kid"], ".4f")]
        lines.append(line)
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
