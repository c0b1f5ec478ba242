"""Which guidance scale, in which interval of t, and how many steps? A grid, each setting judged by retrieval and KID.

Guidance trades variety for obedience and steps cost time, so there is no setting that is best at everything. The
choice is made by three rules in turn, each of which keeps what can't be told from the best:

    1. retrieval    top-5 recall, of held-out captions, then of training captions. All settings draw the same captions
                    from the same noise, so one is worse if it loses clearly more of them than it wins (McNemar 1947,
                    exact, one-sided)
    2. KID          within one standard error of the smallest among those
    3. cost         the fewest evaluations of the U-Net, then the smallest guidance scale
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ldm.evaluation.settings import Settings
from ldm.inference.defaults import EVERYWHERE

GUIDANCE = (1.0, 2.0, 3.0, 4.0, 6.0)
STEPS = (8, 12, 20)
INTERVALS = (EVERYWHERE, (0.2, 1.0), (0.2, 0.8))
SIGNIFICANT = 0.05
#: Settings => {"evaluations": of the U-Net for a picture, "retrieval": {set: recall}, "kid": figure, "found": {set: of
#: each caption, whether its picture was among the nearest five}}.
Judge = Callable[[Settings], dict[str, Any]]


def sweep(
    judge: Judge,
    guidance: Sequence[float],
    steps: Sequence[int],
    intervals: Sequence[tuple[float, float]],
    seed: int,
) -> list[dict[str, Any]]:
    """Judge every setting of the grid; where nothing is guided (a scale up to 1), the interval doesn't matter."""
    grid = [
        Settings(count, scale, seed, interval if scale > 1 else EVERYWHERE)
        for count, interval, scale in itertools.product(steps, intervals, guidance)
    ]
    return [
        {
            "steps": each.steps,
            "guidance_scale": each.guidance_scale,
            "guidance_interval": list(each.guidance_interval),
            **judge(each),
        }
        for each in dict.fromkeys(grid)
    ]


def choose(rows: Sequence[dict[str, Any]], on: Sequence[str]) -> dict[str, Any]:
    """The setting that the three rules leave.

    Args:
        on: the sets of captions whose retrieval counts, one after the other.
    """
    obedient = list(rows)
    for name in on:
        most = max((row["found"][name] for row in obedient), key=sum)
        obedient = [row for row in obedient if chance_of_losing(row["found"][name], most) > SIGNIFICANT]
    smallest = min((row["kid"] for row in obedient), key=lambda figure: figure["value"])
    most = smallest["value"] + smallest["standard_error"]
    lifelike = [row for row in obedient if row["kid"]["value"] <= most]
    chosen = min(lifelike, key=lambda row: (row["evaluations"], row["guidance_scale"], row["steps"]))
    names = {"num_inference_steps": "steps", **{name: name for name in ("guidance_scale", "guidance_interval")}}
    return {name: chosen[key] for name, key in names.items()}


def chance_of_losing(found: Sequence[bool], best: Sequence[bool]) -> float:
    """How likely a setting as good as the best would lose so many of the captions that only one of both has found."""
    lost = sum(b and not a for a, b in zip(found, best, strict=True))
    apart = sum(a != b for a, b in zip(found, best, strict=True))
    return sum(math.comb(apart, k) for k in range(lost, apart + 1)) / 2**apart


def lines(rows: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The rows that differ in their guidance scale alone, smallest first, by what they have in common.

    Unguided rows belong to every interval.
    """
    intervals = sorted({tuple(row["guidance_interval"]) for row in rows})
    found = {}
    for count, interval in itertools.product(sorted({row["steps"] for row in rows}), intervals):
        alike = [
            row
            for row in rows
            if row["steps"] == count and (row["guidance_scale"] <= 1 or tuple(row["guidance_interval"]) == interval)
        ]
        name = f"{count} steps" + (f", guided in {interval[0]:g} to {interval[1]:g}" if interval != EVERYWHERE else "")
        found[name] = sorted(alike, key=lambda row: row["guidance_scale"])
    return found


def table(rows: Sequence[dict[str, Any]], sets: Sequence[str]) -> str:
    """The grid as text, a line a setting."""
    heads = [
        "steps",
        "guidance",
        "interval",
        "evaluations",
        *(f"{name} top-{k}" for name in sets for k in (1, 5)),
        "KID x 1000",
    ]
    text = ["  ".join(f"{head:>13}" for head in heads)]
    for row in rows:
        shares = [f"{row['retrieval'][name][f'top{k}']['value']:.1%}" for name in sets for k in (1, 5)]
        kid = f"{1000 * row['kid']['value']:.2f}±{1000 * row['kid']['standard_error']:.2f}"
        interval = "{:g} to {:g}".format(*row["guidance_interval"])
        cells = [str(row["steps"]), f"{row['guidance_scale']:g}", interval, str(row["evaluations"]), *shares, kid]
        text.append("  ".join(f"{cell:>13}" for cell in cells))
    return "\n".join(text)


def plot(rows: Sequence[dict[str, Any]], on: str, path: Path) -> None:
    """Retrieval and KID over the guidance scale, a line for each number of steps and interval of t, with error bars."""
    from matplotlib.figure import Figure  # not pyplot, which keeps a state and wants a screen

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    panels = figure.subplots(1, 2)
    for name, line in lines(rows).items():
        scales = [row["guidance_scale"] for row in line]
        for panel, values in zip(
            panels, ([row["retrieval"][on]["top5"] for row in line], [row["kid"] for row in line]), strict=True
        ):
            middle = [value["value"] for value in values]
            below = [max(0.0, value["value"] - value["low"]) for value in values]
            above = [max(0.0, value["high"] - value["value"]) for value in values]
            panel.errorbar(scales, middle, [below, above], marker="o", capsize=2, label=name)
    for panel, label in zip(panels, (f"top-5 retrieval, {on} captions", "KID"), strict=True):
        panel.set(xlabel="guidance scale", ylabel=label)
        panel.grid(alpha=0.3)
    panels[0].legend(frameon=False)
    figure.savefig(path, dpi=120)
