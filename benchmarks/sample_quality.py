"""Is it the same quality? How far each arm's pictures are from its limit and, with data, how real they look.

The limit of an arm is what its process draws with so many steps that more change nothing: what few steps or a short
number format cost is the distance to it, for any weights, from the same noise. Where the model is trained and its
data are there, every arm draws the same captions, and a frozen net looks for each picture among the real ones
(retrieval) and compares them all together (KID).
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

from benchmarks.drawing import Arm
from ldm.evaluation.metrics.intervals import RESAMPLES, mean_figure

BATCH = 8
GRAY = 127.5  # levels in a unit of pixels


def draw_all(arm: Arm, captions: Sequence[str], **told: Any) -> Tensor:
    """Pixels [N,3,H,W] of all captions, in batches; picture i starts from the noise of seed i."""
    parts = []
    with tqdm(total=len(captions), desc=f"drawing: {arm.name} {told or ''}", unit="picture", leave=False) as bar:
        for start in range(0, len(captions), BATCH):
            part = captions[start : start + BATCH]
            parts.append(arm.pixels(part, first_seed=start, **told))
            bar.update(len(part))
    return torch.cat(parts)


def errors(drawn: Tensor, limit: Tensor) -> Tensor:
    """The root mean square difference of each picture to its limit, in gray levels of 255, float64 [N]."""
    return ((drawn - limit).double() * GRAY).square().mean((1, 2, 3)).sqrt()


def limits(ours: Arm, stock: Arm, captions: Sequence[str], steps: int) -> tuple[Tensor, Tensor]:
    """The limits of our process and of stock's, from float32 arms; the same pictures if the processes are the same."""
    theirs = draw_all(stock, captions, num_inference_steps=steps)
    few = {"num_inference_steps": 5}
    if (errors(draw_all(ours, captions[:1], **few), draw_all(stock, captions[:1], **few)) < 0.01).all():
        return theirs, theirs
    return draw_all(ours, captions, num_inference_steps=steps), theirs


@dataclass(frozen=True)
class Judge:
    """Real pictures, and frozen spaces to see them in."""

    gallery: Any
    asked: Any
    spaces: Sequence[Any]
    real: dict[str, Tensor]

    @classmethod
    def of(cls, chosen: argparse.Namespace, size: int, cache: Path) -> Judge:
        """What the options of benchmarks/sampling.py say; `cache` keeps the real pictures' vectors."""
        from ldm.data.dataset import read_captioned
        from ldm.evaluation.contrastive import load_net, read_card
        from ldm.evaluation.features import load_space, pixel_space
        from ldm.evaluation.gallery import Gallery

        pictures = read_captioned(chosen.data, holdout=chosen.holdout)
        gallery = Gallery(pictures, size)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        spaces = [pixel_space(size), *(load_space(spec, size, device) for spec in chosen.features)]
        if read_card(chosen.net) is not None:
            spaces.append(load_net(chosen.net, pictures, size, device))
        asked = gallery.ask(chosen.split, chosen.pictures)
        return cls(gallery, asked, spaces, gallery.vectors(spaces, cache))

    def figures(self, pixels: Tensor) -> dict[str, Any]:
        """Retrieval and KID in each space, and whether each caption was hit first, float64 [N], by space."""
        from ldm.evaluation import examine
        from ldm.evaluation.features import embed_all
        from ldm.evaluation.metrics.distribution import kid_figure

        drawn = embed_all(self.spaces, pixels.split(BATCH))
        told, ranks = examine.retrieval(self.spaces, self.gallery, self.real, drawn, self.asked)
        others = self.gallery.others([self.asked])
        for space in self.spaces:
            told[space.name]["kid"] = kid_figure(drawn[space.name], self.real[space.name][others], RESAMPLES)
        return {"spaces": told, "hits": {name: (rank == 1).double() for name, rank in ranks.items()}}


def compare_quality(arms: Sequence[Arm], float32: tuple[Arm, Arm], captions: Sequence[str], steps: int,
                    judge: Judge | None, grids: Path) -> list[dict[str, Any]]:  # fmt: skip
    """What each arm's pictures of these captions are worth; the first arm is ours, the others are told against it.

    Args:
        float32: ours and stock in float32, which draw the limits.
        steps: of the limits.
        grids: a folder for pictures to look at.
    """
    from ldm.data.grid import captioned_grid
    from ldm.models.vae import to_pictures

    our_limit, stock_limit = limits(*float32, captions, steps)
    rows: list[dict[str, Any]] = []
    values: list[dict[str, Tensor]] = []  # of each arm, by figure: one value for each caption
    for i, arm in enumerate(arms):
        arm.rows = 0
        drawn = draw_all(arm, captions)
        row: dict[str, Any] = {"arm": arm.name, "unet_rows_per_picture": arm.rows / len(captions)}
        values.append({"error": errors(drawn, our_limit if i == 0 else stock_limit)})
        row["error"] = mean_figure(values[i]["error"])
        if judge is not None:
            told = judge.figures(drawn)
            row["spaces"] = told["spaces"]
            values[i] |= {f"top-1, {name}": hits for name, hits in told["hits"].items()}
        if i > 0:
            row["ours_minus_it"] = {name: mean_figure(values[0][name] - its) for name, its in values[i].items()}
            row["ours_is_worse_in"] = worse(rows[0], row)
        rows.append(row)
        grids.mkdir(parents=True, exist_ok=True)
        few = slice(0, 16)
        path = grids / f"sampling-{arm.name.replace(' ', '-')}.png"
        captioned_grid(to_pictures(drawn[few]), captions[few]).save(path)
    return rows


def worse(ours: dict[str, Any], row: dict[str, Any]) -> list[str]:
    """The figures in which ours is worse than a row's: intervals of the difference, or of KID, lie wholly beyond."""
    found = [
        name
        for name, told in row["ours_minus_it"].items()
        if (told["low"] > 0 if name == "error" else told["high"] < 0)
    ]
    for name, told in row.get("spaces", {}).items():
        if ours["spaces"][name]["kid"]["low"] > told["kid"]["high"]:
            found.append(f"KID, {name}")
    return found


def quality_table(rows: Sequence[dict[str, Any]]) -> str:
    """A line for each arm."""

    def cell(figure: dict[str, Any], form: str = ".2f") -> str:
        return f"{figure['value']:{form}} ({figure['low']:{form}} to {figure['high']:{form}})"

    spaces = list(rows[0].get("spaces", {}))
    lines = [["arm", "U-Net rows", "error, gray levels", "ours is worse in"]]
    lines[0] += [f"{figure}, {name}" for name in spaces for figure in ("top-1", "top-5", "KID")]
    lines.append(["---"] * len(lines[0]))
    for i, row in enumerate(rows):
        losses = ", ".join(row["ours_is_worse_in"]) or "nothing" if i else ""
        line = [row["arm"], f"{row['unet_rows_per_picture']:g}", cell(row["error"]), losses]
        for told in row.get("spaces", {}).values():
            line += [cell(told["top1"]), cell(told["top5"]), cell(told["kid"], ".4f")]
        lines.append(line)
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
