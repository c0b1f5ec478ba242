"""Does a model that was trained to inpaint fill half a picture better than its base does, which was not?

    ldm evaluate --data data/emoji --fit-net
    ldm train ldm --config inpaint init=models/emoji data.source=data/emoji run=runs/inpaint
    python -m benchmarks.inpainting data/emoji models/emoji runs/inpaint/pipeline --net nets/emoji --out inpaint.json

Of each held-out picture a half is masked: left, right, upper, lower in turn. All arms get the same captions, masks and
seeds.

    retrieval    the nearest of all pictures to the completed one, by the data's own CLIP: is it the true one?
    KID          of the new half alone, the other one white, to training pictures cut the same way
    kept         retrieval of the masked pictures themselves, their hole white: what the half that is left gives away
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm

from benchmarks.conditions import BATCH
from ldm.data.batches import evenly, load_pixels, spread
from ldm.data.dataset import Row, read_captioned
from ldm.data.grid import captioned_grid
from ldm.evaluation.features import FeatureExtractor, extract_features
from ldm.evaluation.in_domain_clip import load_clip
from ldm.evaluation.metrics.distribution import kid_estimate
from ldm.evaluation.metrics.intervals import RESAMPLES
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


def inverted(mask: Image.Image) -> Image.Image:
    """The mask of the rest."""
    return mask.point([255 - value for value in range(256)])


def fill(
    pipeline: Any, captions: Sequence[str], pictures: Sequence[Image.Image], masks: Sequence[Image.Image], **given: Any
) -> list[Image.Image]:
    """Each picture with its masked half made anew, from seed 0, 1, 2, …"""
    made: list[Image.Image] = []
    for start in tqdm(range(0, len(captions), BATCH), unit="batch"):
        part = slice(start, start + BATCH)
        images, holes = list(pictures[part]), list(masks[part])
        made += pipeline(list(captions[part]), image=images, mask_image=holes, seed=start, **given).images
    return made


def features(extractor: FeatureExtractor, pictures: Sequence[Image.Image]) -> torch.Tensor:
    """The vectors [N,D] of pictures."""
    return extract_features([extractor], to_pixels_of(pictures).split(BATCH))[extractor.name]


def squares(rows: Sequence[Row], size: int) -> list[Image.Image]:
    """The pictures of rows, as training sees them."""
    return to_pictures(torch.stack([load_pixels(row, size) for row in rows]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="captioned pictures, some of them held out")
    parser.add_argument("base", help="the model that was not trained to inpaint")
    parser.add_argument("inpainting", help="the one that was")
    parser.add_argument("--net", type=Path, required=True, help="the data's own CLIP, by `ldm evaluate --fit-net`")
    parser.add_argument("--caption-columns", nargs="+", default=["text"], help="as the CLIP was fitted (default: text)")
    parser.add_argument("--size", type=int, default=64, help="edge of the pictures (default: 64)")
    parser.add_argument("--pictures", type=int, default=200, help="held-out ones, at most (default: 200)")
    parser.add_argument("--steps", type=int, default=20, help="sampling steps (default: 20)")
    parser.add_argument("--guidance-scale", type=float, default=3.0, help="(default: 3)")
    parser.add_argument("--out", type=Path, help="write the figures as JSON, and a sheet beside it")
    chosen = parser.parse_args()

    from ldm import LDMPipeline

    every = read_captioned(chosen.data, caption_columns=chosen.caption_columns)
    extractor = load_clip(chosen.net, every, chosen.size, torch.device("cpu"))
    rows, size = evenly(every.heldout, chosen.pictures), chosen.size
    captions, true = [row.captions[0] for row in rows], squares(rows, size)
    masks = [half_mask(number, size) for number in range(len(rows))]
    gallery = features(extractor, squares(list(every), size))
    matches = caption_matches(captions, [row.captions for row in every])
    some = squares(evenly(every.train, REFERENCE), size)
    reference = features(extractor, [only(one, half_mask(number, size)) for number, one in enumerate(some)])

    def recall(pictures: Sequence[Image.Image]) -> dict[str, Any]:
        rank = ranks(distances(features(extractor, pictures), gallery, extractor.metric), matches)
        return recall_at_k(rank, len(gallery))

    report: dict[str, Any] = {"kept": {"retrieval": recall([only(a, inverted(b)) for a, b in zip(true, masks)])}}
    shown = {"true": true, "masked": [only(a, inverted(b)) for a, b in zip(true, masks)]}
    given = {"num_inference_steps": chosen.steps, "guidance_scale": chosen.guidance_scale}
    for name in ("base", "inpainting"):
        pipeline = LDMPipeline.from_pretrained(getattr(chosen, name)).to_best_device()
        pipeline.set_progress_bar_config(disable=True)
        shown[name] = fill(pipeline, captions, true, masks, **given)
    for name, pictures in shown.items():
        if name != "masked":
            holes = features(extractor, [only(one, mask) for one, mask in zip(pictures, masks)])
            report[name] = {"retrieval": recall(pictures), "kid": kid_estimate(holes, reference, RESAMPLES)}
    print(json.dumps(report, indent=2))
    if chosen.out:
        chosen.out.write_text(json.dumps(report, indent=2) + "\n", "utf-8")
        places = list(spread(len(rows), SHOWN))
        sheet = [pictures[place] for pictures in shown.values() for place in places]
        words = [f"{name}: {captions[place]}" for name in shown for place in places]
        captioned_grid(sheet, words, columns=len(places)).save(chosen.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
