"""Does a LoRA of thirty drawings bring their style to other prompts, and what do prompts without its words lose?

    ldm data emoji data/styles --size 64 --style streamline=icons/streamline       (a designer's style)
    python -m benchmarks.lora sepia data/emoji data/styles                         (or one that is a change of colors)
    python -m benchmarks.lora pick data/styles streamline data/streamline30
    ldm train ldm --config lora data.source=data/streamline30 run=runs/streamline
    python -m benchmarks.lora measure data/styles streamline data/streamline30 runs/streamline/lora --data data/emoji \\
        --caption-columns text styled keywords colored --net nets/emoji --out lora.json

`pick` takes thirty drawings of a designer that the model has not seen, captioned "pizza, streamline style". `measure`
generates with the model alone and with its LoRA, from the same seeds:

    trained    the thirty captions
    new        other captions of that style, of concepts that the model knows from other designers
    old        captions that the model was trained with, without the style's words

    retrieval    the nearest of all drawings of the style (old: of all the model's data) is the caption's
    style        the nearest of all designers' drawings of the concept is this style's
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps
from torch import Tensor

from benchmarks.conditions import BATCH, add_sampling, generate
from ldm.data.batches import evenly, pixel_batches, spread
from ldm.data.dataset import CaptionedPictures, read_captioned
from ldm.data.grid import captioned_grid
from ldm.evaluation.features import extract_features, pixel_extractor
from ldm.evaluation.in_domain_clip import load_clip
from ldm.evaluation.metrics.retrieval import (
    caption_matches,
    distances,
    ranks,
    recall_among,
    recall_at_k,
    relatives_estimate,
)
from ldm.evaluation.upscaling import to_pixels_of

PICKED = 30
THINGS = ("activities", "animals-nature", "food-drink", "objects", "travel-places")
BROWN, CREAM = "#3b2412", "#f6eedd"
SHOWN = 8  # pictures of the sheet of each kind of prompts


def plain(pictures: CaptionedPictures) -> CaptionedPictures:
    """The drawings as their designers made them: their caption is the concept alone, or with the style."""
    return pictures.select(
        i for i, row in enumerate(pictures) if row.captions[0] in (row.extra["concept"], styled(row))
    )


def of_style(pictures: CaptionedPictures, style: str) -> CaptionedPictures:
    """The plain drawings of one designer.

    Raises:
        SystemExit: if there are none.
    """
    drawings = plain(pictures)
    its = drawings.select(number for number, row in enumerate(drawings) if row.extra["style"] == style)
    if not len(its):
        found = ", ".join(sorted({row.extra["style"] for row in drawings}))
        raise SystemExit(f"style: no drawings of {style!r} in {pictures.source}; there are {found}")
    return its


def styled(row: Any) -> str:
    """ "pizza, streamline style"."""
    return f"{row.extra['concept']}, {row.extra['style']} style"


def sepia(data: str, out: Path) -> None:
    """A folder of all plain drawings and, as the style "sepia", of OpenMoji's things in brown on cream."""
    (out / "images").mkdir(parents=True, exist_ok=True)
    drawings, lines = list(plain(read_captioned(data))), []
    both = [(row, row.extra["style"]) for row in drawings]
    both += [(row, "sepia") for row in drawings if row.extra["style"] == "openmoji" and row.extra["group"] in THINGS]
    for number, (row, style) in enumerate(both):
        name, picture = f"images/{number:05d}.png", row.image().resize((64, 64), Image.Resampling.LANCZOS)
        (ImageOps.colorize(picture.convert("L"), BROWN, CREAM) if style == "sepia" else picture).save(out / name)
        facts = {"concept": row.extra["concept"], "style": style}
        lines.append(json.dumps({"file_name": name, "text": f"{row.extra['concept']}, {style} style", **facts}) + "\n")
    (out / "metadata.jsonl").write_text("".join(lines), "utf-8")
    print(f"{len(lines)} drawings, {len(both) - len(drawings)} of them in sepia, are in {out}")


def pick(data: str, style: str, out: Path) -> None:
    """A captioned folder of thirty of a designer's drawings, one of every few."""
    rows = evenly(of_style(read_captioned(data), style), PICKED)
    (out / "images").mkdir(parents=True, exist_ok=True)
    lines = []
    for number, row in enumerate(rows):
        name = f"images/{number:02d}.png"
        row.image().save(out / name)
        lines.append(json.dumps({"file_name": name, "text": styled(row)}) + "\n")
    (out / "metadata.jsonl").write_text("".join(lines), "utf-8")
    print(f"{len(lines)} drawings with captions are in {out}")


def measure(chosen: argparse.Namespace) -> None:
    """All figures of a LoRA, as JSON; a sheet of pictures beside `--out`."""
    from ldm import LDMPipeline

    known = read_captioned(chosen.data, caption_columns=chosen.caption_columns)
    size = chosen.size
    extractors = [pixel_extractor(size), load_clip(chosen.net, known, size, torch.device("cpu"))]
    every = plain(read_captioned(chosen.styles))
    its = of_style(every, chosen.style)
    trained = {row.captions[0] for row in read_captioned(chosen.picked)}
    concepts = {row.extra["concept"] for row in plain(known.train)}
    new = its.select(i for i, row in enumerate(its) if styled(row) not in trained and row.extra["concept"] in concepts)

    def embed(pictures: CaptionedPictures, words: str) -> dict[str, Tensor]:
        return extract_features(extractors, pixel_batches(pictures, size, words))

    galleries = {"style": embed(every, "embedding the styles"), "old": embed(known, "embedding the model's data")}
    names = [styled(row) for row in every]
    of_its = torch.tensor([row.extra["style"] == chosen.style for row in every])
    prompts = {
        "trained": sorted(trained),
        "new": [styled(row) for row in evenly(new, chosen.pictures)],
        "old": [row.captions[0] for row in evenly(known.train, chosen.pictures)],
    }

    def figures(kind: str, pictures: Sequence[Image.Image]) -> dict[str, Any]:
        made = extract_features(extractors, to_pixels_of(pictures).split(BATCH))
        report: dict[str, Any] = {}
        for extractor in extractors:
            name = extractor.name
            gallery = galleries["old" if kind == "old" else "style"][name]
            distance = distances(made[name], gallery, extractor.metric)
            if kind == "old":
                matches = caption_matches(prompts[kind], [row.captions for row in known])
                report[name] = recall_at_k(ranks(distance, matches), len(gallery))
                continue
            matches = caption_matches(prompts[kind], [[one] for one in names])
            concept = [prompt.removesuffix(f", {chosen.style} style") for prompt in prompts[kind]]
            related = torch.tensor([[row.extra["concept"] == one for row in every] for one in concept])
            report[name] = recall_at_k(ranks(distance[:, of_its], matches[:, of_its]), int(of_its.sum()))
            report[name] |= relatives_estimate(*recall_among(distance, matches, related))
        return report

    given = {"num_inference_steps": chosen.steps, "guidance_scale": chosen.guidance_scale}
    pipeline = LDMPipeline.from_pretrained(chosen.model).to_best_device()
    pipeline.set_progress_bar_config(disable=True)
    report: dict[str, Any] = {}
    shown: dict[str, list[Image.Image]] = {}
    for arm in ("model", "with the LoRA"):
        if arm != "model":
            pipeline.load_lora_weights(chosen.lora)
        made = {kind: generate(pipeline, texts, {}, **given) for kind, texts in prompts.items()}
        report[arm] = {kind: figures(kind, pictures) for kind, pictures in made.items()}
        shown[arm] = [made[kind][place] for kind in prompts for place in spread(len(prompts[kind]), SHOWN)]
    print(json.dumps(report, indent=2))
    if chosen.out:
        chosen.out.write_text(json.dumps(report, indent=2) + "\n", "utf-8")
        words = [texts[place] for texts in prompts.values() for place in spread(len(texts), SHOWN)]
        rows = [(part, arm) for part in range(0, len(words), SHOWN) for arm in shown]
        pictures = [one for part, arm in rows for one in shown[arm][part : part + SHOWN]]
        captions = [f"{arm}: {one}" for part, arm in rows for one in words[part : part + SHOWN]]
        captioned_grid(pictures, captions, columns=SHOWN).save(chosen.out.with_suffix(".png"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    drawing = commands.add_parser("sepia", help="write a folder with OpenMoji's drawings in sepia, too")
    drawing.add_argument("data", help="what `ldm data emoji` made")
    drawing.add_argument("out", type=Path, help="the folder to make")
    picking = commands.add_parser("pick", help="write a folder of thirty drawings")
    picking.add_argument("styles", help="what `ldm data emoji --style NAME=FOLDER` made")
    picking.add_argument("style", help="the NAME")
    picking.add_argument("out", type=Path, help="the folder to make")
    measuring = commands.add_parser("measure", help="generate and measure")
    measuring.add_argument("styles", help="what `ldm data emoji --style NAME=FOLDER` made")
    measuring.add_argument("style", help="the NAME")
    measuring.add_argument("picked", help="the folder of thirty drawings")
    measuring.add_argument("lora", help="RUN/lora")
    measuring.add_argument("--model", default="models/emoji", help="its base (default: models/emoji)")
    measuring.add_argument("--data", required=True, help="the model's own data")
    measuring.add_argument("--caption-columns", nargs="+", default=["text"], help="of --data (default: text)")
    measuring.add_argument("--net", type=Path, required=True, help="--data's own CLIP, by `ldm evaluate --fit-net`")
    add_sampling(measuring)
    chosen = parser.parse_args()
    if chosen.command == "pick":
        pick(chosen.styles, chosen.style, chosen.out)
    elif chosen.command == "sepia":
        sepia(chosen.data, chosen.out)
    else:
        measure(chosen)


if __name__ == "__main__":
    main()
