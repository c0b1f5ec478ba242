"""Aspect buckets against square crops, at equal steps: what is cut off subjects, and what models generate.

    ldm data scenes data/scenes
    ldm train ldm --config aspect data.source=data/scenes run=runs/aspect
    ldm train ldm --config aspect data.source=data/scenes run=runs/squares data.buckets=false
    python -m benchmarks.aspect data/scenes runs/aspect/pipeline runs/squares/pipeline --out aspect.json

The data set knows where its subjects are (ldm/data/emoji/scenes.py). Of the training pictures it is counted which share
of the subjects' ink, the pixels that aren't white, each kind of crop leaves in the frame. Of both models the held-out
captions of wide and tall scenes are generated:

    in frame    the share of the real subjects' ink where the picture, laid over the real scene, has ink as well
    both        the share of pictures with ink in the places of both subjects
    whole       the share of pictures whose outermost pixels are white: nothing is cut off
    KID         to the real held-out scenes; both are put on a white square (features: `--features`, or pixels)

Each model generates at the scene's own size; the one of square crops also squares, which lie in the scene's middle.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ldm.data.batches import evenly
from ldm.data.buckets import Buckets, bucket_sizes
from ldm.data.dataset import CaptionedPictures, read_captioned
from ldm.data.emoji.scenes import boxes_of
from ldm.data.images import to_pixels, to_size
from ldm.evaluation.features import load_extractor, pixel_extractor
from ldm.evaluation.metrics.distribution import kid_difference, kid_estimate
from ldm.evaluation.metrics.intervals import RESAMPLES, mean_estimate

INK = 230  # a level below it, of 255, in any channel: blurred white isn't ink
LEAST = 0.02  # share of a place that a subject covers
Mask = npt.NDArray[np.bool_]


def ink(picture: Image.Image) -> Mask:
    """Where a picture isn't white, bool [H,W]."""
    return np.asarray(picture.convert("RGB")).min(-1) < INK


def left_in(picture: Image.Image, size: tuple[int, int]) -> float:
    """The share of a picture's ink that a center crop to the aspect ratio of `size` (width, height) leaves."""
    mask = ink(picture)
    width, height = picture.size
    wide = min(width, round(height * size[0] / size[1]))
    high = min(height, round(width * size[1] / size[0]))
    left, top = (width - wide) // 2, (height - high) // 2
    return float(mask[top : top + high, left : left + wide].sum() / max(1, mask.sum()))


def in_frame(made: Image.Image, real: Image.Image) -> float:
    """The share of the real scene's ink where `made`, as large as fits in its middle, has ink as well."""
    truth, found = ink(real), np.zeros((real.height, real.width), bool)
    scale = min(real.width / made.width, real.height / made.height)
    wide, high = round(made.width * scale), round(made.height * scale)
    left, top = (real.width - wide) // 2, (real.height - high) // 2
    found[top : top + high, left : left + wide] = ink(made.resize((wide, high), Image.Resampling.LANCZOS))
    return float((truth & found).sum() / max(1, truth.sum()))


def shows_all(made: Image.Image, real: Image.Image, boxes: Sequence[tuple[int, int, int, int]]) -> bool:
    """Whether a picture of the real scene's aspect ratio has ink in the places of all subjects."""
    mask = ink(made.resize(real.size, Image.Resampling.LANCZOS))
    return all(mask[top:bottom, left:right].mean() >= LEAST for left, top, right, bottom in boxes)


def is_whole(made: Image.Image) -> bool:
    """Whether at most a hundredth of a picture's outermost pixels is ink."""
    mask = ink(made)
    edge = np.concatenate([mask[0], mask[-1], mask[1:-1, 0], mask[1:-1, -1]])
    return float(edge.mean()) <= 0.01


def on_squares(pictures: Sequence[Image.Image], edge: int) -> Tensor:
    """Pictures in the middle of white squares, pixels [N,3,edge,edge]."""
    squares = []
    for picture in pictures:
        longer = max(picture.size)
        square = Image.new("RGB", (longer, longer), "white")
        square.paste(picture.convert("RGB"), ((longer - picture.width) // 2, (longer - picture.height) // 2))
        squares.append(torch.from_numpy(to_pixels(to_size(square, (edge, edge)))))
    return torch.stack(squares)


def generate(pipeline: Any, captions: Sequence[str], sizes: Sequence[tuple[int, int]], **given: Any) -> list[Any]:
    """A picture of each caption at its size, from seed 0, 1, 2, …"""
    made = []
    for seed, (caption, (width, height)) in enumerate(zip(tqdm(captions, unit="picture"), sizes, strict=True)):
        made += pipeline(caption, width=width, height=height, seed=seed, **given).images
    return made


def crops(pictures: CaptionedPictures, buckets: Buckets, size: int) -> dict[str, Any]:
    """What is left of the subjects' ink in training pictures, by buckets and by squares."""
    left: dict[str, list[float]] = {"buckets": [], "squares": []}
    for number, row in enumerate(tqdm(pictures, "measuring crops", unit="picture")):
        image = row.image()
        left["buckets"].append(left_in(image, buckets.size(number)))
        left["squares"].append(left_in(image, (size, size)))
    return {name: mean_estimate(torch.tensor(shares), RESAMPLES) for name, shares in left.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="what `ldm data scenes` made")
    parser.add_argument(
        "buckets", nargs="?", help="the pipeline trained with data.buckets=true; none measures crops alone"
    )
    parser.add_argument("squares", nargs="?", help="the pipeline trained with data.buckets=false")
    parser.add_argument("--size", type=int, default=64, help="data.size of both (default: 64)")
    parser.add_argument("--step", type=int, default=16, help="what divides all sides (default: 16)")
    parser.add_argument("--pictures", type=int, default=200, help="captions, at most (default: 200)")
    parser.add_argument("--steps", type=int, default=20, help="sampling steps (default: 20)")
    parser.add_argument("--guidance-scale", type=float, default=3.0, help="(default: 3)")
    parser.add_argument("--features", help="a network for KID, as of `ldm evaluate`; none is pixels")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    chosen = parser.parse_args()

    pictures = read_captioned(chosen.data)
    sizes = bucket_sizes(chosen.size, chosen.step, 2.0)
    report: dict[str, Any] = {"crops": crops(pictures.train, Buckets.nearest(pictures.train.sizes, sizes), chosen.size)}
    if chosen.buckets and chosen.squares:
        report |= generated(pictures.heldout, chosen, sizes)
    print(json.dumps(report, indent=2))
    if chosen.out:
        chosen.out.write_text(json.dumps(report, indent=2) + "\n", "utf-8")


def generated(heldout: CaptionedPictures, chosen: argparse.Namespace, sizes: Any) -> dict[str, Any]:
    """The figures of both models on held-out scenes that aren't square."""
    from ldm import LDMPipeline

    long = heldout.select(i for i, (width, height) in enumerate(heldout.sizes.tolist()) if width != height)
    rows = list(evenly(long, chosen.pictures))
    real, boxes = [row.image() for row in rows], [boxes_of(row.extra["boxes"]) for row in rows]
    captions = [row.captions[0] for row in rows]
    own = [Buckets.nearest(np.array([image.size]), sizes).size(0) for image in real]
    given = {"num_inference_steps": chosen.steps, "guidance_scale": chosen.guidance_scale}
    made: dict[str, list[Any]] = {"real": real}
    for arm in ("buckets", "squares"):
        pipeline = LDMPipeline.from_pretrained(getattr(chosen, arm)).to_best_device()
        pipeline.set_progress_bar_config(disable=True)
        made[arm] = generate(pipeline, captions, own, **given)
        if arm == "squares":
            made["squares, square frames"] = generate(pipeline, captions, [(chosen.size,) * 2] * len(rows), **given)

    report: dict[str, Any] = {}
    for arm, images in made.items():
        both = [shows_all(image, truth, places) for image, truth, places in zip(images, real, boxes, strict=True)]
        figures = {
            "in frame": [in_frame(image, truth) for image, truth in zip(images, real, strict=True)],
            "both": both if "frames" not in arm else None,
            "whole": [is_whole(image) for image in images],
        }
        report[arm] = {
            name: mean_estimate(torch.tensor(values, dtype=torch.float64), RESAMPLES)
            for name, values in figures.items()
            if values is not None
        }
    edge = max(max(size) for size in sizes)
    extractor = load_extractor(chosen.features, edge, torch.device("cpu")) if chosen.features else pixel_extractor(edge)
    features = {arm: extractor.embed(on_squares(images, edge)) for arm, images in made.items() if "frames" not in arm}
    for arm in ("buckets", "squares"):
        report[arm]["KID"] = kid_estimate(features[arm], features["real"], RESAMPLES)
    report["KID, buckets minus squares"] = kid_difference(
        features["squares"], features["buckets"], features["real"], RESAMPLES
    )
    return {"generated": report, "features": extractor.describe()}


if __name__ == "__main__":
    main()
