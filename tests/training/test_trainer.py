"""What the loop does is the same for every task: signals, resume, names in the log, folders of checkpoints."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import road
import tiny
import torch
from safetensors.torch import load_file

from ldm.data.dataset import read_captioned
from ldm.models.vae import VAEConfig, build_vae
from ldm.system.errors import RunError
from ldm.training.config import Config
from ldm.training.normalization import normalize_on
from ldm.training.run import train
from ldm.training.signals import EXIT_CODES, Stopped
from ldm.training.trainer import Trainer

STEPS = 6
RECIPES: dict[str, dict[str, Any]] = {
    "vae": {"vae": "null", "vae_training__adversarial": 0.1, "vae_training__adversarial_start": 2},
    "ldm": {"loop__sample_every": 0},
    "classifier": {"data__label_column": "color", "classifier__channels": [8, 16], "data__flip": True},
    "lora": {"loop__sample_every": 0, "lora__rank": 2},
    "distill": {"loop__sample_every": 0, "optim__ema_decay": 0.6},
}
#: What each task leaves in its run.
EXPORTED = {
    "vae": "vae/config.json",
    "ldm": "pipeline/model_index.json",
    "classifier": "classifier/config.json",
    "lora": "lora/lora.json",
    "distill": "pipeline/scheduler/scheduler_config.json",
}
NAMED = {task: task for task in RECIPES} | {"lora": "ldm"}  # what `ldm train` calls it


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of pictures, a text encoder, and a VAE of random weights (normalized as soon as it is used)."""
    folder = tmp_path_factory.mktemp("trainer")
    road.draw_folder(folder / "data")
    tiny.save_text_encoder(folder / "text", "bert")
    base = tiny.pipeline(folder / "pipeline")
    base.vae.save_pretrained(folder / "vae")
    base.save_pretrained(folder / "base")
    return folder


def recipe(home: Path, run: Path, task: str, **words: Any) -> Config:
    settings: dict[str, Any] = {"vae": str(home / "vae"), "run": str(run), "loop__evaluate_every": 0}
    for section in ("loop", "vae_training", "classifier_training"):
        settings |= {f"{section}__steps": STEPS, f"{section}__batch_size": 8, f"{section}__log_every": 1}
        settings |= {f"{section}__checkpoint_every": 3}
    if task in ("lora", "distill"):
        settings |= {"init": str(home / "base"), **road.OF_INIT}
    return road.recipe(home, **settings | RECIPES[task] | words)


@pytest.fixture(scope="module")
def straight(home: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, list[float]]]:
    """For each task a run that nothing happened to, and its losses."""
    folder = tmp_path_factory.mktemp("straight")
    return {task: (folder / task, train(NAMED[task], recipe(home, folder / task, task))) for task in RECIPES}


def stop_at(monkeypatch: pytest.MonkeyPatch, step: int, number: signal.Signals) -> None:
    """Let a signal come while this step is taken, counted from 1."""
    real = Trainer.step

    def taken(self: Trainer, n: int, parts: Any) -> Any:
        if n + 1 == step:
            os.kill(os.getpid(), number)
        return real(self, n, parts)

    monkeypatch.setattr(Trainer, "step", taken)


@pytest.mark.parametrize("number", EXIT_CODES, ids=lambda number: number.name)
@pytest.mark.parametrize("task", RECIPES)
def test_any_signal_at_any_step_saves_it_and_the_rest_is_exact(
    home: Path, tmp_path: Path, straight: dict[str, tuple[Path, list[float]]], monkeypatch: pytest.MonkeyPatch,
    task: str, number: signal.Signals,
) -> None:  # fmt: skip
    """Stopped at the first step, in the middle, and at the last, of one run."""
    config, (whole, losses), name = recipe(home, tmp_path, task), straight[task], NAMED[task]
    for step in {signal.SIGINT: (2, 6), signal.SIGTERM: (1, 4), signal.SIGUSR1: (3,)}[number]:
        with monkeypatch.context() as patch, pytest.raises(Stopped) as stopped:
            stop_at(patch, step, number)
            train(name, config)
        assert stopped.value.code == EXIT_CODES[number] and stopped.value.signal == number
        assert stopped.value.saved == f"step {step} of {STEPS} is saved in {tmp_path / 'checkpoints' / name}"
        assert (tmp_path / f"checkpoints/{name}/step_{step:07d}/manifest.json").exists()
    assert train(name, config) == losses[step:]
    assert list(road.logged(tmp_path, f"{name}/loss").values()) == losses
    for file in (whole / f"checkpoints/{name}/step_{STEPS:07d}").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / f"checkpoints/{name}" / file.parent.name / file.name).read_bytes()
    assert (tmp_path / EXPORTED[task]).exists()


@pytest.mark.parametrize("task", RECIPES)
def test_every_task_logs_under_its_name_and_validates_exports_and_previews(
    straight: dict[str, tuple[Path, list[float]]], task: str
) -> None:
    (run, losses), name = straight[task], NAMED[task]
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text("utf-8").splitlines()]
    names = {key for row in rows for key in row} - {"step", "time"}
    assert all(key.startswith(f"{name}/") for key in names)
    assert {f"{name}/{key}" for key in ("loss", "lr", "images_per_second")} <= names
    assert list(road.logged(run, f"{name}/loss").values()) == losses
    metric = {"vae": "vae/heldout/psnr", "classifier": "classifier/heldout/q1"}.get(task)
    assert metric is None or list(road.logged(run, metric)) == [3, 6]
    previews = ["step_0000003.png", "step_0000006.png"] if task == "vae" else []
    assert sorted(path.name for path in run.glob("*/step_*.png")) == previews
    assert [path.name for path in run.iterdir() if path.name.endswith("checkpoints")] == ["checkpoints"]
    assert [path.name for path in (run / "checkpoints").iterdir()] == [name]


def test_a_vae_is_left_in_its_run_only_once_it_is_trained(home: Path, tmp_path: Path) -> None:
    """A U-Net's training that finds RUN/vae relies on it."""
    config = recipe(home, tmp_path, "vae")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped):
        stop_at(patch, 4, signal.SIGTERM)
        train("vae", config)
    assert (tmp_path / "reconstructions/step_0000003.png").exists() and not (tmp_path / "vae").exists()
    train("vae", config)
    trained = load_file(tmp_path / "checkpoints/vae/step_0000006/vae.safetensors")
    left = load_file(tmp_path / "vae/diffusion_pytorch_model.safetensors")
    folded = {name for name in left if "quant_conv" in name}  # the latents' mean and std
    assert folded and {f"vae.{name}" for name in left} == trained.keys()
    assert all((left[name] == trained[f"vae.{name}"]).all() != (name in folded) for name in left)


def test_checkpoints_of_earlier_versions_are_resumed(
    home: Path, tmp_path: Path, straight: dict[str, tuple[Path, list[float]]]
) -> None:
    """The U-Net's used to be in RUN/checkpoints itself."""
    whole, losses = straight["ldm"]
    shutil.copytree(whole, tmp_path / "run")
    folder = tmp_path / "run/checkpoints"
    (folder / "ldm/step_0000003").rename(folder / "step_0000003")
    shutil.rmtree(folder / "ldm")
    config = recipe(home, tmp_path / "run", "ldm", resume__allow=["vae"])
    assert train("ldm", config) == losses[3:]
    assert [path.name for path in folder.rglob("step_*")] == ["step_0000003", "step_0000006"]
    assert (folder / "ldm/step_0000006").exists()


# --- what a resumed run does again ------------------------------------------------------------------------


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files count as unchanged however young they are."""
    monkeypatch.setattr("ldm.data.facts.SETTLED", 0.0)
    monkeypatch.setattr("ldm.training.facts.SETTLED", 0.0)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often pictures are decoded, encoders loaded, weights hashed, folders saved and exported."""
    counted: Counter[str] = Counter()

    def count(where: str, name: str) -> None:
        owner, attribute = where.rsplit(".", 1)
        real = getattr(importlib.import_module(owner), attribute)

        def counting(*arguments: Any, **named: Any) -> Any:
            counted[name] += 1
            return real(*arguments, **named)

        monkeypatch.setattr(where, counting)

    for module in ("dataset", "facts"):
        count(f"ldm.data.{module}.decode", "decoded")
    for module in ("vae", "text_encoder"):
        count(f"ldm.models.{module}.load_network", "loaded")
    count("ldm.models.fingerprint.weights_of", "hashed")
    count("ldm.training.tasks.diffusion.save_frozen", "frozen")
    for task in ("autoencoder", "diffusion", "classifier"):
        count(f"ldm.training.tasks.{task}.export", "exported")
    return counted


@pytest.mark.usefixtures("settled")
@pytest.mark.parametrize("task", ["ldm", "classifier"])
def test_a_resumed_run_decodes_loads_hashes_and_saves_nothing_again(
    home: Path, tmp_path: Path, calls: Counter[str], task: str
) -> None:
    words = {"loop__evaluate_every": 3, "loop__prompts": ["red heart"]}
    config = recipe(home, tmp_path, task, **words)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped):
        stop_at(patch, 3, signal.SIGTERM)
        train(task, config)
    assert calls["decoded"] and calls["loaded"] and calls["hashed"] and calls["frozen"] == (task == "ldm")
    calls.clear()
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        real = Trainer.step
        patch.setattr(Trainer, "step", lambda *words: (seen.append(Counter(calls)), real(*words))[1])
        train(task, config)
    # the checkpoint of step 3 was saved when the signal came; its export was left to do
    assert seen[0] == {"exported": 1} and len(seen) == 3
    calls.clear()
    assert train(task, config) == [] and not calls
    # changed prompts are part of what pipelines share
    assert train(task, recipe(home, tmp_path, task, **words | {"loop__prompts": ["blue cat"]})) == []
    assert calls["frozen"] == (task == "ldm") and calls["decoded"] == 0


@pytest.mark.usefixtures("settled")
def test_a_missing_export_is_made_again(home: Path, tmp_path: Path, calls: Counter[str]) -> None:
    config = recipe(home, tmp_path, "classifier")
    train("classifier", config)
    shutil.rmtree(tmp_path / "classifier")
    calls.clear()
    assert train("classifier", config) == []
    assert calls["exported"] == 1 and (tmp_path / EXPORTED["classifier"]).exists()


def test_other_encoders_than_before_are_refused(home: Path, tmp_path: Path) -> None:
    """RUN/vae trained anew under a U-Net: its latents would be others."""
    torch.manual_seed(1)
    pictures = read_captioned(home / "data", holdout=0.2, progress=False).train
    for seed in (1, 2):
        torch.manual_seed(seed)
        vae = build_vae(VAEConfig(channels=(16, 32), layers=1)).eval()
        normalize_on(vae, pictures, tiny.SIZE)
        vae.save_pretrained(tmp_path / "vae")
        config = recipe(home, tmp_path, "classifier", vae="null", classifier_training__steps=3 * seed,
                        resume__allow=["classifier_training.steps"])  # fmt: skip
        if seed == 1:
            train("classifier", config)
            continue
        with pytest.raises(RunError, match=r"(?s)\n  encoders: '\w+' => '\w+' \(weights or scale.*allow=\[encoders\]'"):
            train("classifier", config)
        allowed = (*config.resume.allow, "encoders")
        assert len(train("classifier", road.replace(config, resume={"allow": allowed}))) == 3
