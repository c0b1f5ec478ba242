"""`ldm train`: recipes by name, keys over them, and the scripts that do the same."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import road
import yaml

from ldm.cli import train
from ldm.cli.config import parse_config
from ldm.cli.main import main
from ldm.cli.recipes import recipes
from ldm.training.config import to_dict


def test_a_recipe_is_found_by_its_name_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert set(recipes()) == {path.stem for path in (road.ROOT / "configs").glob("*.yaml")} >= {"demo", "own64"}
    for name, file in recipes().items():
        assert parse_config(["--config", name]) == parse_config(["--config", str(file)])


def test_a_file_of_that_name_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("demo").write_text("run: mine\n")
    assert parse_config(["--config", "demo"]).run == "mine"
    Path("own64").mkdir()
    assert parse_config(["--config", "own64"]).run == "runs/mine"  # a folder is no recipe


@pytest.mark.parametrize("name", ["dmo", "configs/demo.yaml", "demo.yaml", "", "\0", "x" * 5000, "/"])
def test_an_unknown_recipe_lists_those_that_there_are(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        main(["train", "ldm", "--config", name])
    said = capsys.readouterr().err
    assert stopped.value.code == 2
    assert said.startswith("ldm train ldm: error: --config: ") and len(said.splitlines()) == 1
    assert "expected a YAML file, or one of base256, demo, finetune, inpaint, openmoji64, own64" in said


def test_keys_override_the_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--config", "demo", "optim.lr=0.5", "--loop.steps", "7", "run=runs/mine"]
    with pytest.raises(SystemExit) as stopped:
        main(["train", "vae", *words, "--print_config"])
    assert stopped.value.code == 0
    assert yaml.safe_load(capsys.readouterr().out) == to_dict(parse_config(words))


@pytest.mark.parametrize("task", train.TASKS)
def test_the_command_and_the_script_run_the_same_training(
    task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = []
    monkeypatch.setattr("ldm.training.run.train", lambda *arguments: ran.append(arguments))
    monkeypatch.setattr("ldm.training.signals.install", lambda: None)
    words = ["--config", "demo", f"run={tmp_path}", "loop.steps=3"]
    main(["train", task, *words])
    monkeypatch.setattr(sys, "argv", [f"train_{task}.py", *words])
    exec((road.ROOT / f"train/train_{task}.py").read_text("utf-8"), {"__name__": "__main__"})
    assert ran == [(task, parse_config(words))] * 2


def test_a_command_that_accelerate_can_launch() -> None:
    """The wheel has no train/*.py: several GPUs start the module."""
    command = [sys.executable, "-m", "ldm.cli.main", "train", "classifier", "--help"]
    environment = {**os.environ, "PYTHONPATH": str(road.ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr
    assert "usage: ldm train classifier [--config RECIPE] [KEY=VALUE ...]" in done.stdout
    assert "Train a classifier of noisy latents" in done.stdout
