"""The short form of every drill; `make test-faults` is the full one (docs/reliability.md has its figures)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import road
from run import SIZES, ZERO

#: What each drill must have done at the least, so that its zeros mean something.
DONE = {
    "kills": {"kills": 6, "runs finished": 1, "losses compared": 9},
    "signals": {"trials": 4, "losses compared": 36},
    "damage": {"trials": 3, "files compared": 9},
    "lost_ranks": {"losses compared": 9, "files compared": 5},
    "disk": {"trials": 3, "ended with an error": 1, "files compared": 10},
    "poison": {"places": 3, "tensors examined": 300},
}


@pytest.fixture(scope="module")
def figures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """A process of its own runs them: it forks, which one that has trained before must not."""
    out = tmp_path_factory.mktemp("faults") / "figures.json"
    command = [sys.executable, "tests/faults/run.py", "--out", str(out), "--seed", "1"]
    environment = {**os.environ, "PYTHONPATH": str(road.ROOT)}
    done = subprocess.run(command, cwd=road.ROOT, env=environment, capture_output=True, text=True, timeout=1200)
    assert out.exists(), done.stdout[-3000:] + done.stderr[-3000:]
    print(done.stdout[-6000:])
    found: dict[str, dict[str, Any]] = json.loads(Path(out).read_text())
    return found


@pytest.mark.parametrize("drill", DONE)
def test_nothing_is_lost(figures: dict[str, dict[str, Any]], drill: str) -> None:
    found = figures[drill]
    assert not {name: found[name] for name in ZERO if found.get(name)}
    assert all(found[name] >= least for name, least in DONE[drill].items()), found


def test_every_drill_has_a_short_form(figures: dict[str, dict[str, Any]]) -> None:
    assert figures.keys() == DONE.keys() == {name for name, (short, _) in SIZES.items() if short}
