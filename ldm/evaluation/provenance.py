"""What is known of the run that made a model, kept beside its evaluation: OUT/run.json.

    {"step": 900, "config": {...}, "curves": {"loss": [[step, value], ...], ...}}

The run goes on and its log grows; what was evaluated stays as it was.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

FILE = "run.json"
CURVES = ("loss", "heldout/total", *(f"heldout/q{i}" for i in (1, 2, 3, 4)), "heldout/text_gap", "heldout/null_gap")
POINTS = 240  # of a curve; a longer one is averaged


def record_run(out: Path, run: Path | None, step: int | None, config: dict[str, Any] | None) -> None:
    """Write OUT/run.json, or remove it where the model isn't a run's or the run left nothing to tell."""
    curves = read_curves(run / "log.jsonl") if run else {}
    if config is None and not curves:
        (out / FILE).unlink(missing_ok=True)
        return
    out.mkdir(parents=True, exist_ok=True)
    told = {"step": step, "config": config, "curves": curves}
    (out / FILE).write_text(json.dumps(told, ensure_ascii=False) + "\n", "utf-8")


def carry_run(model: Path, out: Path) -> None:
    """Write OUT/run.json as an exported model's folder tells it.

    Raises:
        ValueError: if that file isn't what `record_run` writes; the model may be a stranger's.
    """
    path = model / FILE
    try:
        told = json.loads(path.read_text("utf-8"))
        step, config, curves = (told[key] for key in ("step", "config", "curves"))
        points = [point for name in curves for point in curves[name]]
        whole = all(math.isfinite(step) and math.isfinite(value) for step, value in points)
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
        whole = False
    if not whole or not isinstance(step, int | None) or not isinstance(config, dict | None):
        raise ValueError(f"{path}: expected the step, config and curves that ldm export writes; delete the file")
    out.mkdir(parents=True, exist_ok=True)
    (out / FILE).write_text(json.dumps(told, ensure_ascii=False) + "\n", "utf-8")


def read_curves(log: Path) -> dict[str, list[tuple[float, float]]]:
    """(step, value) by name; where a resumed run has told a step twice, what it said last."""
    found: dict[str, dict[int, float]] = {}
    for line in log.read_text("utf-8").splitlines() if log.exists() else []:
        try:
            row = json.loads(line)
        except ValueError:
            continue  # a line that a killed run has not finished
        for name in CURVES:
            if math.isfinite(row.get(name, math.nan)):
                found.setdefault(name, {})[row["step"]] = row[name]
    return {name: averaged(sorted(points.items())) for name, points in found.items()}


def averaged(points: list[tuple[int, float]], most: int = POINTS) -> list[tuple[float, float]]:
    """At most so many points: the means of consecutive ones, as nearly equal in number as they can be."""
    edges = [i * len(points) // min(most, len(points)) for i in range(min(most, len(points)) + 1)]
    parts = [points[a:b] for a, b in zip(edges, edges[1:])]
    return [(sum(s for s, _ in part) / len(part), sum(v for _, v in part) / len(part)) for part in parts]
