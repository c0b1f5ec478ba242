"""The record of a training run: its curves, and what is refused as a record."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from ldm.evaluation.provenance import averaged, copy_run_record, read_curves


@pytest.mark.parametrize("task", ["", "ldm/", "distill/"])
def test_curves_are_the_log_and_the_last_value_of_a_step_counts(tmp_path: Path, task: str) -> None:
    losses = [(1, 3.0), (2, float("nan")), (3, 9.0), (3, 2.0)]
    rows = [{"step": step, f"{task}loss": loss, "vae/loss": 7.0} for step, loss in losses]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"st')
    assert read_curves(tmp_path / "log.jsonl") == {"loss": [(1, 3.0), (3, 2.0)]}
    assert read_curves(tmp_path / "none.jsonl") == {}
    many = [(step, float(step)) for step in range(1000)]
    short = averaged(many, 7)
    assert len(short) == 7 and all(step == value for step, value in short)
    assert short[0][0] == pytest.approx(np.mean(range(142)))


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"step": 1, "config": 3, "curves": {}}', '{"step": "1", "config": null, "curves": {}}',
     '{"step": 1, "config": null, "curves": []}' + "x", '{"step": 1, "config": null, "curves": {"loss": [[1]]}}',
     '{"step": 1, "config": null, "curves": {"loss": [["a", "b"]]}}', '{"step": 1, "config": null, "curves": 7}'],
)  # fmt: skip
def test_a_malformed_run_record_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(ValueError, match=r"run\.json: expected the step, config and curves"):
        copy_run_record(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
