"""Does an upscaler beat resampling? PSNR and KID of held-out pictures, and whether a base's pictures keep their prompt.

    truth shrunk => bicubic | Lanczos + unsharp | upscaler, at some noise levels => PSNR to the truth, KID to training
                    pictures; beside them the KID of the true held-out pictures, the best there is to reach
    base's pictures of held-out prompts => bicubic | upscaler => retrieval: is the nearest true picture the prompt's?

PSNR rewards blur: a picture between all that are possible has the least error. KID sees what is missing then.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor

from ldm.data.batches import evenly, load_pixels, pixel_batches
from ldm.data.dataset import CaptionedPictures
from ldm.data.grid import captioned_grid, full_edge
from ldm.data.images import to_pixels
from ldm.evaluation.features import BATCH, FeatureExtractor, extract_features
from ldm.evaluation.metrics.distribution import kid_estimate
from ldm.evaluation.metrics.intervals import RESAMPLES, mean_estimate
from ldm.evaluation.metrics.retrieval import caption_matches, distances, ranks, recall_at_k
from ldm.models.vae import psnr, to_pictures

LEVELS = (0, 20, 100, 200)  # of noise
REFERENCE = 1000  # training pictures
SHOWN = 6  # pictures in the sheet
FILE, SHEET = "upscaling.json", "upscaling.png"


def evaluate_upscaler(
    pipeline: Any,
    pictures: CaptionedPictures,
    extractors: Sequence[FeatureExtractor],
    out: Path,
    *,
    most: int | None = None,
    levels: Sequence[int] = LEVELS,
    base: Any = None,
    batch_size: int = 8,
    seed: int = 0,
) -> dict[str, Any]:
    """Measure an LDMUpscalePipeline, and write upscaling.json and a sheet of pictures.

    Args:
        extractors: of features of pictures of the large size.
        most: held-out pictures, spread evenly; None is all.
        base: an LDMPipeline whose pictures of the held-out prompts are upscaled, too.
    Raises:
        ValueError: if there are too few held-out or training pictures.
    """
    rows = pictures.heldout if most is None else evenly(pictures.heldout, most)
    reference = evenly(pictures.train, REFERENCE)
    if len(rows) < 2 or len(reference) < 2:
        raise ValueError(f"data: expected two held-out and two training pictures, got {len(rows)} and {len(reference)}")
    edge, size = pipeline.tile, pipeline.tile * pipeline.factor
    levels = [level for level in levels if level <= pipeline.config.max_noise_level]
    small = to_pictures(torch.stack([load_pixels(row, edge) for row in rows]))
    true = torch.stack([load_pixels(row, size) for row in rows])
    captions = [row.captions[0] if row.captions else "" for row in rows]
    texts = pipeline.fitting(captions)

    def upscaled(sources: Sequence[Image.Image], level: int) -> Tensor:
        made = pipeline.upscale(list(sources), texts, noise_level=level, seed=seed, batch_size=batch_size).images
        return to_pixels_of(made)

    made = {"bicubic": resampled(small, size, False), "Lanczos + unsharp": resampled(small, size, True)}
    made |= {f"upscaler, noise level {level}": upscaled(small, level) for level in levels}
    real = extract_features(extractors, pixel_batches(reference, size, "embedding training pictures"))
    report: dict[str, Any] = {"pictures": len(rows), "reference": len(reference), "edge": edge, "size": size,
                              "spaces": [one.describe() for one in extractors], "methods": {}}  # fmt: skip
    for name, pixels in {**made, "true pictures": true}.items():
        vectors = extract_features(extractors, pixels.split(BATCH))
        found = {space: kid_estimate(vectors[space], real[space], RESAMPLES) for space in vectors}
        report["methods"][name] = {"kid": found}
        if name in made:
            report["methods"][name]["psnr_db"] = mean_estimate(psnr(pixels, true))
    if base is not None:
        report["retrieval"] = retrieval_kept(base, captions, upscaled, true, extractors, size, batch_size, seed)
    out.mkdir(parents=True, exist_ok=True)
    (out / FILE).write_text(json.dumps(report, indent=2) + "\n", "utf-8")
    kinds = {"small": small, **{name: to_pictures(pixels[:SHOWN]) for name, pixels in made.items()}}
    shown = {name: list(some[:SHOWN]) for name, some in {**kinds, "true": to_pictures(true[:SHOWN])}.items()}
    words = [name for name, some in shown.items() for _ in some]
    sheet = [picture for some in shown.values() for picture in some]
    captioned_grid(sheet, words, columns=min(SHOWN, len(rows)), edge=full_edge(sheet)).save(out / SHEET)
    return report


def retrieval_kept(
    base: Any, captions: Sequence[str], upscaled: Any, true: Tensor, extractors: Sequence[FeatureExtractor], size: int,
    batch_size: int, seed: int,
) -> dict[str, Any]:  # fmt: skip
    """Recall of the prompts among the true pictures: of the base's pictures enlarged, and of the upscaler's."""
    small: list[Image.Image] = []
    for start in range(0, len(captions), batch_size):
        part = list(captions[start : start + batch_size])
        given = {"prompt": part} if base.tokenizer is not None else {"num_images_per_prompt": len(part)}
        small += base(**given, seed=seed + start).images
    gallery, matches = (
        extract_features(extractors, true.split(BATCH)),
        caption_matches(captions, [[c] for c in captions]),
    )
    found: dict[str, Any] = {}
    for name, pixels in {"bicubic": resampled(small, size, False), "upscaler": upscaled(small, 20)}.items():
        vectors = extract_features(extractors, pixels.split(BATCH))
        found[name] = {
            one.name: recall_at_k(
                ranks(distances(vectors[one.name], gallery[one.name], one.metric), matches), len(captions)
            )
            for one in extractors
        }
    return found


def resampled(small: Sequence[Image.Image], size: int, sharp: bool) -> Tensor:
    """Pictures enlarged by Pillow, [N,3,size,size] in [-1,1]: bicubic, or Lanczos with its unsharp mask behind it."""
    if not sharp:
        return to_pixels_of([one.resize((size, size), Image.Resampling.BICUBIC) for one in small])
    mask = ImageFilter.UnsharpMask()
    return to_pixels_of([one.resize((size, size), Image.Resampling.LANCZOS).filter(mask) for one in small])


def to_pixels_of(pictures: Sequence[Image.Image]) -> Tensor:
    """RGB pictures of one size => pixels [N,3,H,W] in [-1,1]."""
    return torch.from_numpy(to_pixels(np.stack([np.asarray(one) for one in pictures])))


def table(report: dict[str, Any]) -> str:
    """The report as lines of text."""
    spaces = [one["name"] for one in report["spaces"]]
    head = ["method", "PSNR, dB", *(f"KID, {space}" for space in spaces)]
    lines = [head]
    for name, found in report["methods"].items():
        psnr_db = f"{found['psnr_db']['value']:.2f}" if "psnr_db" in found else ""
        kids = [found["kid"][space] for space in spaces]
        lines.append([name, psnr_db, *(f"{kid['value']:.4f} ({kid['low']:.4f} to {kid['high']:.4f})" for kid in kids)])
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    text.append(f"{report['pictures']} held-out pictures, {report['edge']} => {report['size']} px; KID to "
                f"{report['reference']} training pictures")  # fmt: skip
    for name, found in report.get("retrieval", {}).items():
        for space, recall in found.items():
            top = ", ".join(f"top {k} {recall[f'top{k}']['value']:.0%}" for k in (1, 5))
            text.append(f"the base's pictures, {name}: {top} of {recall['candidates']} prompts, {space}")
    return "\n".join(text)
