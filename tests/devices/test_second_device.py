"""No tensor is left behind on the CPU: trainings, examinations and drawing on a device that only pretends."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import road
import tiny


def run(*words: object) -> str:
    """A command on the pretended device; returns what it printed."""
    command = [sys.executable, "tests/pretend.py", *map(str, words)]
    environment = {**os.environ, "PYTHONPATH": f"{road.ROOT}:{road.ROOT / 'tests'}"}
    done = subprocess.run(command, cwd=road.ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of pictures, a text encoder, and a VAE trained on the device."""
    folder = tmp_path_factory.mktemp("road")
    road.draw_folder(folder / "data")
    tiny.save_text_encoder(folder / "text", "bert")
    recipe = road.recipe(
        folder, vae_training__steps=6, vae_training__adversarial=0.1, vae_training__adversarial_start=2
    )
    said = run("train/train_vae.py", "--config", road.save_recipe(recipe, folder / "recipe.yaml"))
    assert "on pretend" in said and "dB PSNR" in said
    return folder


def test_a_tensor_left_behind_is_noticed(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import torch\n"
        "a = torch.ones(2, device='pretend')\n"
        "assert (a + a).sum().item() == 4 and (a + 1).cpu().tolist() == [2, 2]\n"
        "try:\n    a + torch.ones(2)\n"
        "except RuntimeError as error:\n    assert 'same device' in str(error)\n"
        "else:\n    raise AssertionError('they met')\n"
    )
    run(script)


def test_a_training_with_a_cache_its_trial_and_its_pipeline(home: Path, tmp_path: Path) -> None:
    words = ("--config", home / "recipe.yaml", f"run={tmp_path}", f"vae={home / 'run/vae'}", "loop.log_every=1")
    words += ("doctor=true", "data.flip=true", "loop.half_size_steps=2", "loop.steps=4", "loop.sample_every=4")
    said = run("train/train_ldm.py", *words)
    assert "on pretend" in said
    run("train/train_ldm.py", *words, "loop.steps=6")
    assert list(road.logged(tmp_path, "ldm/loss")) == [1, 2, 3, 4, 5, 6]
    assert (tmp_path / "samples/step_0000004.png").exists()


def test_a_training_that_encodes_at_every_step_on_all_conditions(home: Path, tmp_path: Path) -> None:
    run(
        "train/train_ldm.py", "--config", home / "recipe.yaml", f"run={tmp_path}", f"vae={home / 'run/vae'}",
        "data.cache=off", "data.label_column=color", "data.condition_column=outline", "loop.accumulation=2",
        "diffusion.timestep_sampling=loss_second_moment", "diffusion.variance=learned", "diffusion.loss=vlb",
    )  # fmt: skip
    assert (tmp_path / "samples/step_0000006.png").exists()


def test_a_picture_and_an_examination(home: Path, tiny_pipeline_folder: Path, tmp_path: Path) -> None:
    cli = tmp_path / "cli.py"  # what `ldm` on the command line is
    cli.write_text("from ldm.cli.main import main\nmain()\n")
    run(cli, "sample", tiny_pipeline_folder, "red heart", "--steps", "2", "--out", tmp_path / "drawn.png")
    assert (tmp_path / "drawn.png").exists()
    words = ("--data", home / "data", "--out", tmp_path / "out", "--quick", "--steps", "2")
    net = ("--fit-net", "--net-epochs", "1", "--net-text", home / "text", "--net", tmp_path / "net")
    run(cli, "evaluate", tiny_pipeline_folder, *words, *net)
    assert '"device": "pretend"' in (tmp_path / "out/evaluation.json").read_text("utf-8")
    run(cli, "evaluate", tiny_pipeline_folder, *words, "--nll", "--strata", "3", "--holdout", "0.5")
    assert (tmp_path / "out/nll.json").exists()


def test_a_classifier(home: Path, tmp_path: Path) -> None:
    words = ("classifier_training.steps=4", "classifier_training.checkpoint_every=2", "data.label_column=color")
    run(
        "train/train_classifier.py",
        "--config",
        home / "recipe.yaml",
        f"run={tmp_path}",
        f"vae={home / 'run/vae'}",
        *words,
    )
    assert (tmp_path / "classifier").is_dir()
