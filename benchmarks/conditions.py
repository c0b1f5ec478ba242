"""Do pictures follow the second picture that they are made of? On held-out rows, with captions and without.

    ldm data openmoji data/sketches --condition outline
    ldm train ldm --config sketch data.source=data/sketches run=runs/sketch
    python -m benchmarks.conditions data/sketches runs/sketch/pipeline outline --out sketch.json

    ldm data openmoji data/colors --condition colors
    ldm train ldm --config sketch data.source=data/colors data.condition_column=colors run=runs/colors
    python -m benchmarks.conditions data/colors runs/colors/pipeline colors --out colors.json

    outline    edge agreement: the F1 of the edges of both pictures, within a pixel of each other
    colors     the share of the pixels inside the map's colored areas whose nearest palette entry, of 24, is the map's

Each is measured with the second picture given, with another row's (shuffled), and of the real pictures: what a perfect
model reaches, since a drawing's lines cover some of its colors and its fills have edges of their own.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from tqdm import tqdm

from ldm.data.batches import evenly, spread
from ldm.data.conditioned import ConditionedPictures
from ldm.data.dataset import read_captioned
from ldm.data.emoji.variants import nearest_entries
from ldm.data.grid import captioned_grid
from ldm.evaluation.metrics.intervals import RESAMPLES, mean_estimate

EDGE = 100.0  # levels of gray from a pixel to its neighbors, of 255, that make an edge
BATCH = 16
SHOWN = 10  # pictures of the sheet, each in its own column

Agreement = Callable[[Image.Image, Image.Image], float]


def edges(picture: Image.Image) -> npt.NDArray[np.bool_]:
    """Where gray changes by more than EDGE between the neighbors of a pixel, bool [H,W]."""
    gray = np.pad(np.asarray(picture.convert("L"), np.float64), 1, mode="edge")
    across, down = gray[1:-1, 2:] - gray[1:-1, :-2], gray[2:, 1:-1] - gray[:-2, 1:-1]
    return np.hypot(across, down) > EDGE


def near(mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """A mask grown by a pixel in all eight directions."""
    padded = np.pad(mask, 1)
    high, wide = mask.shape
    return np.any([padded[y : y + high, x : x + wide] for y in range(3) for x in range(3)], axis=0)


def edge_agreement(made: Image.Image, outline: Image.Image) -> float:
    """F1 of the edges of two pictures of one size: 1 if each edge has one of the other's within a pixel; 0 if none."""
    found, wanted = edges(made), edges(outline)
    precision = (found & near(wanted)).sum() / max(1, found.sum())
    recall = (wanted & near(found)).sum() / max(1, wanted.sum())
    return float(2 * precision * recall / max(1e-9, precision + recall))


def inside(entries: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """The pixels [H,W] whose eight neighbors have the same entry."""
    padded = np.pad(entries, 1, constant_values=-1)
    high, wide = entries.shape
    return np.all([padded[y : y + high, x : x + wide] == entries for y in range(3) for x in range(3)], axis=0)


def right_entries(made: Image.Image, colors: Image.Image) -> float:
    """The share of the pixels inside the map's colored areas whose nearest palette entry is the map's.

    Inside are pixels whose eight neighbors have the same entry: drawings have their lines where areas meet.
    """
    entries = nearest_entries(np.asarray(colors.convert("RGB")))
    colored = (entries != 0) & inside(entries)
    right = nearest_entries(np.asarray(made.convert("RGB"))) == entries
    return float((right & colored).sum() / max(1, colored.sum()))


AGREEMENTS: dict[str, Agreement] = {"outline": edge_agreement, "colors": right_entries}


def generate(
    pipeline: Any, captions: Sequence[str], each: Mapping[str, Sequence[Image.Image]], **given: Any
) -> list[Image.Image]:
    """A picture of each caption, from seed 0, 1, 2, …

    Args:
        each: arguments of the pipeline that have a value for each caption.
        given: those that have one for all.
    """
    made: list[Image.Image] = []
    for start in tqdm(range(0, len(captions), BATCH), unit="batch"):
        part = slice(start, start + BATCH)
        own = {name: list(values[part]) for name, values in each.items()}
        made += pipeline(list(captions[part]), seed=start, **own, **given).images
    return made


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """The options of what is generated, and of where the figures go."""
    parser.add_argument("--size", type=int, default=64, help="edge of the real pictures (default: 64)")
    parser.add_argument("--pictures", type=int, default=200, help="held-out rows, at most (default: 200)")
    parser.add_argument("--steps", type=int, default=20, help="sampling steps (default: 20)")
    parser.add_argument("--guidance-scale", type=float, default=3.0, help="(default: 3)")
    parser.add_argument("--out", type=Path, help="write the figures as JSON, and pictures beside it if there are any")


def figures(agreement: Agreement, made: Sequence[Image.Image], conditions: Sequence[Image.Image]) -> dict[str, Any]:
    """The agreement with the given second pictures, with those of the next rows, and the paired difference."""
    sized = [one.resize(picture.size, Image.Resampling.NEAREST) for one, picture in zip(conditions, made, strict=True)]
    given = [agreement(picture, one) for picture, one in zip(made, sized, strict=True)]
    shuffled = [agreement(picture, one) for picture, one in zip(made, sized[1:] + sized[:1], strict=True)]
    values = {"given": torch.tensor(given), "shuffled": torch.tensor(shuffled)}
    values["difference"] = values["given"] - values["shuffled"]
    return {name: mean_estimate(each, RESAMPLES) for name, each in values.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="what `ldm data openmoji --condition` made")
    parser.add_argument("pipeline", nargs="?", help="trained on it; none measures the real pictures alone")
    parser.add_argument("column", choices=AGREEMENTS, help="data.condition_column")
    add_sampling(parser)
    chosen = parser.parse_args()

    agreement, size = AGREEMENTS[chosen.column], (chosen.size, chosen.size)
    source = ConditionedPictures.read(read_captioned(chosen.data), condition_column=chosen.column).heldout
    rows = evenly(source, chosen.pictures)
    conditions = [rows.condition(number).image() for number in range(len(rows))]
    captions = [row.captions[0] for row in rows.pictures]
    report = {"real": figures(agreement, [row.image().resize(size) for row in rows.pictures], conditions)}
    if chosen.pipeline:
        from ldm import LDMPipeline

        pipeline = LDMPipeline.from_pretrained(chosen.pipeline).to_best_device()
        pipeline.set_progress_bar_config(disable=True)
        given = {"num_inference_steps": chosen.steps, "guidance_scale": chosen.guidance_scale}
        shown = {chosen.column: conditions}
        for name, texts in (("with captions", captions), ("without captions", [""] * len(captions))):
            shown[name] = generate(pipeline, texts, {"condition": conditions}, **given)
            report[name] = figures(agreement, shown[name], conditions)
        shown["real"] = [row.image() for row in rows.pictures]
    print(json.dumps(report, indent=2))
    if chosen.out:
        chosen.out.write_text(json.dumps(report, indent=2) + "\n", "utf-8")
        if chosen.pipeline:
            places = list(spread(len(captions), SHOWN))
            sheet = [pictures[place].convert("RGB").resize(size) for pictures in shown.values() for place in places]
            words = [f"{arm}: {captions[place]}" for arm in shown for place in places]
            captioned_grid(sheet, words, columns=len(places)).save(chosen.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
