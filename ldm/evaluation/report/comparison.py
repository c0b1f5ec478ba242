"""The comparison of two models for people: OUT/comparison.html, and its table in the terminal.

Like the report of one model, the page is made from the files in OUT alone, holds no scripts, and escapes captions.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

from ldm.evaluation.report.page import SMALL, inline_picture, model_name, read_json, templates
from ldm.evaluation.report.text import SPLITS, number, sampling, signed

FILE = "comparison.json"
PAGE = "comparison.html"
SHOWN = 24  # gains, and as many losses, of a prompt set
CLEAR = 0.05  # p below which a difference is called one
LOWER = ("validation loss", "distance", "KID")  # metrics that begin so are better when lower


def write_comparison(out: Path) -> Path:
    """Make OUT/comparison.html from the files in OUT; returns its path."""
    unfinished = (out / PAGE).with_suffix(".new")
    unfinished.write_text(templates().get_template("comparison.html").render(view(out)), "utf-8")
    unfinished.rename(out / PAGE)
    return out / PAGE


def view(out: Path) -> dict[str, Any]:
    """The template's variables."""
    report = read_json(out / FILE)
    main = f"distance to the real picture, {report['spaces'][-1]['name']}"
    return {
        "report": report,
        "names": names(report),
        "settings": [
            sampling(*(model["settings"][key] for key in ("steps", "guidance_scale", "guidance_interval")))
            for model in report["models"]
        ],
        "main": main,
        "called": SPLITS,
        "ranked": {split: ranked(found["pictures"], main) for split, found in report["sets"].items()},
        "verdict": verdict,
        "picture": lru_cache(None)(lambda name: inline_picture(out / name)),
        "small": report["models"][0]["size"] <= SMALL,
    }


def names(report: dict[str, Any]) -> list[str]:
    """What to call both models: by folder, with a letter where that is the same."""
    found = [model_name(model["folder"]) for model in report["models"]]
    return found if found[0] != found[1] else [f"{name}, {side}" for name, side in zip(found, "AB", strict=True)]


def ranked(pictures: list[dict[str, Any]], metric: str) -> dict[str, list[dict[str, Any]]]:
    """The prompts that B gains most on, and loses most, by a metric of which less is better."""

    def gain(picture: dict[str, Any]) -> float:
        a, b = picture["values"][metric]
        return float(a - b)

    order = sorted(pictures, key=gain, reverse=True)
    gains = [picture for picture in order if gain(picture) > 0][:SHOWN]
    losses = [picture for picture in reversed(order) if gain(picture) < 0][:SHOWN]
    return {"B is nearer to the real picture": gains, "A is nearer to the real picture": losses}


def verdict(metric: str, test: dict[str, Any]) -> str:
    """ "A", "B" or "": which is better, if the difference is clear: by p, or for KID by an interval without 0."""
    clear = test["p"] < CLEAR if "p" in test else not test["low"] <= 0 <= test["high"]
    if not clear or test["value"] == 0:
        return ""
    return "B" if (test["value"] < 0) == metric.startswith(LOWER) else "A"


def comparison_table(report: dict[str, Any]) -> str:
    """A line for each metric of each prompt set."""
    a, b = names(report)
    lines = [f"A: {a}", f"B: {b}"]
    for split, found in report["sets"].items():
        lines.append(f"{SPLITS[split]}, n {found['n']}: A, B, B - A with its 95 % interval, p, the better one")
        for metric, test in found["tests"].items():
            interval = f"{signed(test['value'])} ({signed(test['low'])} to {signed(test['high'])})"
            p = f"{test['p']:.4f}" if "p" in test else "-"
            better = verdict(metric, test) or "no clear difference"
            lines.append(f"  {metric:<46} {number(test['a']):>8} {number(test['b']):>8}  {interval}  {p}  {better}")
    return "\n".join(lines)
