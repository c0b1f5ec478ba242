"""loop.minutes: what a recipe becomes in a given time, and that a resumed run takes it from RUN/budget.json."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import road
import tiny

from ldm.data.dataset import read_captioned
from ldm.system.errors import RunError
from ldm.training import budget
from ldm.training.budget import Budget, limited
from ldm.training.config import Config
from ldm.training.run import train


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("budget")
    road.draw_folder(folder / "data")
    tiny.save_text_encoder(folder / "text", "bert")
    tiny.pipeline(folder / "pipeline").vae.save_pretrained(folder / "vae")
    return folder


def recipe(home: Path, **words: object) -> Config:
    settings: dict[str, object] = {
        "vae": str(home / "vae"), "loop__steps": 1600, "loop__half_size_steps": 400, "optim__warmup": 100,
        "loop__batch_size": 4, "data__holdout": 0.0, **words,
    }  # fmt: skip
    return road.recipe(home, **settings)


def test_a_recipe_is_scaled_to_its_time(home: Path) -> None:
    """Steps fill nine tenths of the time less three previews; all else keeps its proportion to the steps."""
    config = recipe(home, loop__minutes=10.0)
    found = Budget.of(config, pictures=400, seconds=1.0, half_seconds=0.4, left=540.0)
    previews = 3 * (2 * 2 * 2) / (3 * 4)  # prompts, steps, rows; a step of four rows costs twelve forward passes
    assert found.steps == int((0.9 * 540 - previews) / (0.25 * 0.4 + 0.75 * 1.0))
    assert found.half_size_steps == pytest.approx(found.steps / 4, abs=1)
    assert found.pictures == pytest.approx(400 * found.steps / 1600, abs=1)
    assert found.warmup == pytest.approx(100 * found.steps / 1600, abs=1)
    assert found.training_seconds == pytest.approx(0.9 * 540 - previews, abs=1.5)
    faster = Budget.of(config, pictures=400, seconds=0.25, half_seconds=0.1, left=540.0)
    assert faster.steps > 3.9 * found.steps and faster.pictures == 400 and faster.warmup == 100
    small = recipe(home, loop__minutes=10.0, data__limit=80)  # a recipe for 80 of the 400
    assert Budget.of(small, 400, 1.0, 0.4, 540.0).pictures == pytest.approx(80 * found.steps / 1600, abs=1)
    assert Budget.of(small, 400, 0.1, 0.04, 540.0).pictures > 80
    scaled = found.apply(config)
    assert scaled.loop.steps == found.steps and scaled.data.limit == found.pictures
    assert 3 * scaled.loop.sample_every >= found.steps > 2 * scaled.loop.sample_every
    cooling = found.apply(recipe(home, optim__cooldown=400, optim__ema_snapshot_every=80)).optim
    assert cooling.cooldown == pytest.approx(found.steps / 4, abs=1)
    assert found.steps / cooling.ema_snapshot_every == pytest.approx(1600 / 80, rel=0.05)


def test_too_little_time_is_refused_with_the_least_that_would_do(home: Path) -> None:
    with pytest.raises(ValueError, match=r"loop.minutes: 1 are too few: a step takes 20.0 s here; set at least \d+"):
        Budget.of(recipe(home, loop__minutes=1.0), 400, seconds=20.0, half_seconds=9.0, left=50.0)


def test_every_rank_refuses_too_little_time_together(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0 measured 20 s, this fast rank 1 ms: rank 0's figures count, so both refuse and neither waits alone."""
    task = SimpleNamespace(config=recipe(home, loop__minutes=1.0), accelerator=SimpleNamespace(is_main_process=False))
    monkeypatch.setattr(budget, "step_seconds", lambda *_: 0.001)
    monkeypatch.setattr(budget, "broadcast_object_list", lambda figures: [20.0, 9.0, 50.0][: len(figures)])
    with pytest.raises(ValueError, match="loop.minutes: 1 are too few: a step takes 20.0 s here"):
        budget.decide(task, 400)  # type: ignore[arg-type]


def test_pictures_of_the_prompts_stay_and_held_out_ones_too(home: Path) -> None:
    pictures = read_captioned(home / "data", holdout=0.3, progress=False)
    some = limited(pictures, 6, ["blue heart", "yellow cat", "red garden", "no such thing"])
    assert len(some.train) == 6 and [row.where for row in some.heldout] == [row.where for row in pictures.heldout]
    wanted = {"blue heart", "yellow cat", "red garden"} & {row.captions[0] for row in pictures.train}
    assert wanted and wanted <= {row.captions[0] for row in some.train}
    order = [row.where for row in pictures]
    assert [row.where for row in some] == sorted((row.where for row in some), key=order.index)
    assert limited(pictures, 0, []) is pictures and limited(pictures, 10**6, []) is pictures


def test_a_run_in_minutes_measures_once_and_resumes_what_it_decided(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run of some seconds; then, as if killed, from its first checkpoint, with another clock and no measuring."""
    config = recipe(home, run=str(tmp_path / "run"), loop__minutes=1.0, loop__sample_every=0)
    now = time.time()
    monkeypatch.setattr(budget.time, "time", lambda: now - 10**6)  # a process that began just now
    monkeypatch.setattr(budget.psutil.Process, "create_time", lambda self: now - 10**6 - 50)  # 10 of 60 s are left
    losses = train("ldm", config)
    decided = json.loads((tmp_path / "run/budget.json").read_text("utf-8"))
    assert len(losses) == decided["steps"] >= budget.FEWEST_STEPS
    state = json.loads(max((tmp_path / "run/checkpoints").rglob("state.json")).read_text("utf-8"))
    assert state["config"]["loop"]["steps"] == decided["steps"]
    assert state["config"]["data"]["limit"] == decided["pictures"]

    monkeypatch.setattr(budget, "step_seconds", lambda *_: pytest.fail("measured again"))
    newest = max(path for path in (tmp_path / "run/checkpoints").rglob("step_*") if path.is_dir())
    for file in newest.iterdir():
        file.unlink()
    newest.rmdir()
    again = train("ldm", config)
    assert 0 < len(again) < len(losses) and again == losses[-len(again) :]

    other = dataclasses.replace(config, loop=dataclasses.replace(config.loop, minutes=2.0))
    with pytest.raises(RunError, match=r"loop.minutes: .* began with 1, got 2; set it back"):
        train("ldm", other)
    plain = recipe(home, run=str(tmp_path / "plain"), loop__steps=2, loop__half_size_steps=0, loop__sample_every=0)
    train("ldm", plain)
    with pytest.raises(RunError, match="loop.minutes: .*plain began without it; set it to 0"):
        train("ldm", dataclasses.replace(plain, loop=dataclasses.replace(plain.loop, minutes=1.0)))
