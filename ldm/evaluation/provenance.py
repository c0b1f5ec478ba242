"""Where an evaluation comes from: the machine, and the training run, whose record is kept in OUT/run.json.

    {"step": 900, "config": {...}, "curves": {"loss": [[step, value], ...], ...}}

A run continues and its log grows; the record stays as it was when the model was evaluated.
"""

from __future__ import annotations

import json
import math
import os
import platform
from pathlib import Path
from typing import Any

import diffusers
import torch

RUN_FILE = "run.json"
CURVES = ("loss", "heldout/total", *(f"heldout/q{i}" for i in (1, 2, 3, 4)), "heldout/text_gap", "heldout/null_gap")
POINTS = 240  # of a curve; a longer one is averaged


def machine(device: torch.device) -> dict[str, Any]:
    """Processor, device, system and versions."""
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
    }


def processor() -> str:
    """The processor's name according to the system."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text("utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def record_run(out: Path, run: Path | None, step: int | None, config: dict[str, Any] | None) -> None:
    """Write OUT/run.json; without a config or a log, remove it."""
    curves = read_curves(run / "log.jsonl") if run else {}
    if config is None and not curves:
        (out / RUN_FILE).unlink(missing_ok=True)
        return
    out.mkdir(parents=True, exist_ok=True)
    record = {"step": step, "config": config, "curves": curves}
    (out / RUN_FILE).write_text(json.dumps(record, ensure_ascii=False) + "\n", "utf-8")


def copy_run_record(model: Path, out: Path) -> None:
    """Copy the run.json of an exported model's folder to OUT/run.json, after checking it.

    Raises:
        ValueError: if the file isn't what `record_run` writes; the model may come from an untrusted source.
    """
    path = model / RUN_FILE
    try:
        record = json.loads(path.read_text("utf-8"))
        step, config, curves = (record[key] for key in ("step", "config", "curves"))
        points = [point for name in curves for point in curves[name]]
        valid = all(math.isfinite(step) and math.isfinite(value) for step, value in points)
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
        valid = False
    if not valid or not isinstance(step, int | None) or not isinstance(config, dict | None):
        raise ValueError(f"{path}: expected the step, config and curves that ldm export writes; delete the file")
    out.mkdir(parents=True, exist_ok=True)
    (out / RUN_FILE).write_text(json.dumps(record, ensure_ascii=False) + "\n", "utf-8")


def read_curves(log: Path) -> dict[str, list[tuple[float, float]]]:
    """(step, value) by name. A resumed run may log a step twice; the later value counts."""
    found: dict[str, dict[int, float]] = {}
    for line in log.read_text("utf-8").splitlines() if log.exists() else []:
        try:
            row = json.loads(line)
        except ValueError:
            continue  # an unfinished line of a killed run
        for name in CURVES:
            for key in (f"ldm/{name}", f"distill/{name}", name):  # up to version 0.1 without the prefix
                if math.isfinite(row.get(key, math.nan)):
                    found.setdefault(name, {})[row["step"]] = row[key]
    return {name: averaged(sorted(points.items())) for name, points in found.items()}


def averaged(points: list[tuple[int, float]], most: int = POINTS) -> list[tuple[float, float]]:
    """At most `most` points: the means of consecutive groups of nearly equal size."""
    edges = [i * len(points) // min(most, len(points)) for i in range(min(most, len(points)) + 1)]
    groups = [points[a:b] for a, b in zip(edges, edges[1:])]
    return [(sum(s for s, _ in group) / len(group), sum(v for _, v in group) / len(group)) for group in groups]
