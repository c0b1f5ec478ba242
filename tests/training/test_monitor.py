"""Steps that are skipped, and losses that jump, against what numpy says."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from ldm.system.errors import RunError
from ldm.training.logging import Tracker
from ldm.training.monitor import Monitor, mean_of_finite, samples_of_steps
from ldm.training.randomness import row_of

NAN, INF = float("nan"), float("inf")


def pictures() -> Any:
    return [SimpleNamespace(where=f"data row {i}") for i in range(5)]


def row_of_7(n: int) -> int:
    return row_of(7, n, 5)


def monitor(tmp_path: Path, **words: Any) -> Monitor:
    tracker = Tracker(tmp_path)
    settings = {"task": "ldm", "max_skipped": 3, "spike": 8.0, **words}
    samples_of = samples_of_steps(row_of_7, 2, pictures())
    return Monitor(Accelerator(cpu=True), tracker, samples_of, lambda step: 0.25, **settings)


def record(monitor: Monitor, losses: list[float]) -> None:
    for step, loss in enumerate(losses):
        monitor.record(step, torch.tensor(loss), torch.tensor(float(not math.isfinite(loss))), 0)


def events(tmp_path: Path) -> list[dict[str, Any]]:
    path = tmp_path / "log.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [row for row in rows if "event" in row]


def test_the_samples_of_a_step_are_named_with_their_rows() -> None:
    named = samples_of_steps(row_of_7, 2, pictures())(11)
    rows = [row_of(7, n, 5) for n in (22, 23)]
    assert named == {"samples": [22, 23], "rows": [f"data row {row}" for row in rows]}


def test_so_many_in_a_row_end_the_run_and_fewer_do_not(tmp_path: Path) -> None:
    seen = monitor(tmp_path)
    record(seen, [1, NAN, NAN, 1, NAN, INF, 1])
    assert seen.skipped == 4
    assert mean_of_finite(seen.take_losses()) == 1
    with pytest.raises(RunError) as ended:
        record(seen, [NAN, NAN, NAN])
    for word in (
        "3 steps in a row",
        "at step 3",
        "lr 0.25",
        "samples 4 to 5",
        *samples_of_steps(row_of_7, 2, pictures())(2)["rows"],
    ):
        assert word in str(ended.value)
    assert [event["step"] for event in events(tmp_path)] == [2, 3, 5, 6, 1, 2, 3]


def test_a_jump_is_written_down_and_ordinary_noise_is_not(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    losses = (1 + 0.1 * rng.standard_normal(300)).tolist()
    losses[150] = 1 + 0.1 * 12
    losses[200] = 0.01  # a fall is no spike
    record(monitor(tmp_path), losses)
    (spike,) = events(tmp_path)
    recent = np.array(losses[:150])
    sigma = 1.4826 * np.median(np.abs(recent - np.median(recent)))
    assert (spike["event"], spike["step"], spike["samples"]) == ("spike", 151, [300, 301])
    assert spike["sigmas"] == pytest.approx((losses[150] - np.median(recent)) / sigma, rel=1e-4)
    assert len(spike["rows"]) == 2
    record(monitor(tmp_path / "off", spike=0), losses)
    assert not events(tmp_path / "off")
