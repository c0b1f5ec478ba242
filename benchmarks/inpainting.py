"""Does a model that was trained to inpaint fill half a picture better than its base does, which was not?

    ldm evaluate --data data/emoji --fit-net
    ldm train ldm --config inpaint init=models/emoji data.source=data/emoji run=runs/inpaint
    python -m benchmarks.inpainting data/emoji models/emoji runs/inpaint/pipeline --net nets/emoji --out inpaint.json

Of each held-out picture a half is masked: left, right, upper, lower in turn. All arms get the same captions, masks and
seeds; then the same without captions.

    retrieval    the nearest of all pictures to the completed one, by the data's own CLIP: is it the true one?
    KID          of the new half alone, the other one white, to training pictures cut the same way
    distance     of the new half to the true one, root mean square of all its values of 255
    kept         retrieval of the masked pictures themselves, their hole white: what the half that is left gives away
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from benchmarks.conditions import BATCH, add_sampling, generate
from ldm.data.batches import evenly, load_pixels, pixel_batches, spread
from ldm.data.dataset import read_captioned
from ldm.data.grid import captioned_grid
from ldm.evaluation.features import extract_features
from ldm.evaluation.in_domain_clip import load_clip
from ldm.evaluation.metrics.distribution import kid_estimate
from ldm.evaluation.metrics.intervals import RESAMPLES, mean_estimate
from ldm.evaluation.metrics.retrieval import caption_matches, distances, ranks, recall_at_k
from ldm.evaluation.upscaling import to_pixels_of
from ldm.models.vae import to_pictures

REFERENCE = 1000  # training pictures
SHOWN = 8  # pictures of the sheet, each in its own column


def half_mask(number: int, size: int) -> Image.Image:
    """White where picture `number` is to be new: its left, right, upper or lower half, in turn."""
    middle = size // 2
    box = [(0, 0, middle, size), (middle, 0, size, size), (0, 0, size, middle), (0, middle, size, size)][number % 4]
    mask = Image.new("L", (size, size), 0)
    mask.paste(255, box)
    return mask


def only(picture: Image.Image, mask: Image.Image) -> Image.Image:
    """A picture where the mask is white; white elsewhere."""
    return Image.composite(picture, Image.new("RGB", picture.size, "white"), mask)


def hole_distance(picture: Image.Image, true: Image.Image, mask: Image.Image) -> float:
    """Root mean square difference where the mask is white, in values of 255."""
    white = np.asarray(mask) > 127
    difference = np.asarray(picture, np.float64)[white] - np.asarray(true, np.float64)[white]
    return float(np.sqrt(np.square(difference).mean()))


def inverted(mask: Image.Image) -> Image.Image:
    """The mask of the rest."""
    return mask.point([255 - value for value in range(256)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="captioned pictures, some of them held out")
    parser.add_argument("base", help="the model that was not trained to inpaint")
    parser.add_argument("inpainting", help="the one that was")
    parser.add_argument("--net", type=Path, required=True, help="the data's own CLIP, by `ldm evaluate --fit-net`")
    parser.add_argument("--caption-columns", nargs="+", default=["text"], help="as the CLIP was fitted (default: text)")
    add_sampling(parser)
    chosen = parser.parse_args()

    from ldm import LDMPipeline

    every = read_captioned(chosen.data, caption_columns=chosen.caption_columns)
    extractor = load_clip(chosen.net, every, chosen.size, torch.device("cpu"))
    size, name = chosen.size, extractor.name
    rows, some = evenly(every.heldout, chosen.pictures), evenly(every.train, REFERENCE)
    gallery = extract_features([extractor], pixel_batches(every, size, "embedding all pictures"))[name]
    captions = [row.captions[0] for row in rows]
    matches = caption_matches(captions, [row.captions for row in every])
    true, known = (to_pictures(torch.stack([load_pixels(row, size) for row in each])) for each in (rows, some))

    def features(pictures: Sequence[Image.Image]) -> Tensor:
        return extract_features([extractor], to_pixels_of(pictures).split(BATCH))[name]

    def recall(pictures: Sequence[Image.Image]) -> dict[str, Any]:
        return recall_at_k(ranks(distances(features(pictures), gallery, extractor.metric), matches), len(gallery))

    masks = [half_mask(number, size) for number in range(max(len(true), len(known)))]
    reference = features([only(picture, mask) for picture, mask in zip(known, masks)])
    shown = {"true": true, "kept": [only(picture, inverted(mask)) for picture, mask in zip(true, masks)]}
    given = {"num_inference_steps": chosen.steps, "guidance_scale": chosen.guidance_scale}
    for arm in ("base", "inpainting"):
        pipeline = LDMPipeline.from_pretrained(getattr(chosen, arm)).to_best_device()
        pipeline.set_progress_bar_config(disable=True)
        each = {"image": true, "mask_image": masks[: len(true)]}
        shown[arm] = generate(pipeline, captions, each, **given)
        shown[f"{arm}, no caption"] = generate(pipeline, [""] * len(captions), each, **given)
    report: dict[str, Any] = {arm: {"retrieval": recall(pictures)} for arm, pictures in shown.items()}
    far: dict[str, Tensor] = {}
    for arm in shown.keys() - {"kept"}:
        holes = features([only(picture, mask) for picture, mask in zip(shown[arm], masks)])
        report[arm]["kid"] = kid_estimate(holes, reference, RESAMPLES)
        far[arm] = torch.tensor([hole_distance(*each) for each in zip(shown[arm], true, masks)], dtype=torch.float64)
        report[arm]["distance"] = mean_estimate(far[arm], RESAMPLES)
    for kind in ("", ", no caption"):
        difference = far[f"inpainting{kind}"] - far[f"base{kind}"]
        report[f"distance, inpainting minus base{kind}"] = mean_estimate(difference, RESAMPLES)
    print(json.dumps(report, indent=2))
    if chosen.out:
        chosen.out.write_text(json.dumps(report, indent=2) + "\n", "utf-8")
        places = list(spread(len(true), SHOWN))
        sheet = [pictures[place] for pictures in shown.values() for place in places]
        words = [f"{arm}: {captions[place]}" for arm in shown for place in places]
        captioned_grid(sheet, words, columns=len(places)).save(chosen.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
