"""ldm doctor: a good recipe passes, and each thing that would spoil a run is found and named."""

from __future__ import annotations

import io
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import road
import tiny
import torch
from PIL import Image

from ldm.cli import main as cli
from ldm.data.dataset import read_captioned
from ldm.data.duplicates import duplicates
from ldm.models.vae import VAEConfig, build_vae
from ldm.training.doctor import resources as needs
from ldm.training.doctor.examine import examine
from ldm.training.doctor.findings import Finding
from ldm.training.monitor import Monitor
from ldm.training.trainer import Trainer
from train.train_classifier import main as train_classifier
from train.train_ldm import main as train_ldm
from train.train_vae import main as train_vae

UNET = ["U-Net disk", "U-Net time", "U-Net memory", "U-Net learning"]
VAE = [name.replace("U-Net", "VAE") for name in UNET]


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A folder of pictures, a text encoder, and a VAE that nobody has trained."""
    road.draw_folder(tmp_path / "data")
    tiny.save_text_encoder(tmp_path / "text", "bert")
    torch.manual_seed(0)
    build_vae(VAEConfig(channels=(32, 32))).save_pretrained(tmp_path / "vae")
    return tmp_path


def look(home: Path, until: str | None = None, **words: Any) -> dict[str, Finding]:
    """The findings by name, up to the one that a test is about."""
    findings: dict[str, Finding] = {}
    for found in examine(road.recipe(home, vae=str(home / "vae"), **words)):
        findings[found.check] = found
        if found.check == until:
            break
    return findings


def problems(findings: dict[str, Finding]) -> list[str]:
    return [found.check for found in findings.values() if found.state == "problem"]


def edit_rows(home: Path, change: Any) -> None:
    path = home / "data/metadata.jsonl"
    rows = [change(json.loads(line)) for line in path.read_text("utf-8").splitlines()]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


def test_a_good_recipe_passes_and_nothing_is_written(home: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in home.rglob("*")}
    findings = look(home)
    assert not problems(findings)
    assert list(findings) == ["data", "leak", "captions", "VAE", *UNET]
    first, last = map(float, re.findall(r"from ([\d.]+) to ([\d.]+)", findings["U-Net learning"].message)[0])
    assert last < 0.9 * first
    assert {path: path.stat().st_mtime_ns for path in home.rglob("*")} == before


def test_a_recipe_of_a_student_is_tried_as_one(home: Path) -> None:
    tiny.pipeline(home / "teacher-text").save_pretrained(home / "teacher")
    words: dict[str, Any] = {"init": str(home / "teacher"), "distill__steps": 4, "data__limit": 5, **road.OF_INIT}
    found = {one.check: one for one in examine(road.recipe(home, **words))}
    assert not problems(found)
    assert found["data"].message.startswith("5 of ") and "student time" in found


def test_a_rate_that_cannot_learn_is_named(home: Path) -> None:
    findings = look(home, optim__lr=1e-12)
    assert problems(findings) == ["U-Net learning"]
    assert "set optim.lr higher than 1e-12" in findings["U-Net learning"].message


def test_a_picture_in_both_splits_is_named_with_its_rows(home: Path) -> None:
    rows = read_captioned(home / "data", holdout=0.2, progress=False)
    there, here = rows.heldout[0], rows.train[0]
    shutil.copy(home / "data" / str(there.locator), home / "data" / str(here.locator))
    findings = look(home, until="leak")
    assert findings["leak"].state == "warning"  # it spoils figures, not the model
    assert there.where in findings["leak"].message and here.where in findings["leak"].message


def test_a_disk_that_is_too_small_is_named(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    findings = look(home, until="U-Net disk")
    assert problems(findings) == ["U-Net disk"]
    assert all(word in findings["U-Net disk"].message for word in ("data.cache", "checkpoints", "loop.keep"))


def test_disk_needs_are_what_a_run_writes(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(needs, "gib", lambda size: f"{size} bytes")
    findings = look(home, until="U-Net disk", loop__keep=1)
    sizes = {name: int(size) for size, name in re.findall(r"(\d+) bytes for (\w+)", findings["U-Net disk"].message)}
    train_ldm(road.recipe(home, vae=str(home / "vae"), loop__keep=1))
    run = home / "run"
    written = {
        name: sum(path.stat().st_size for path in (run / name).rglob("*") if path.is_file())
        for name in ("checkpoints", "pipeline", "pipeline/unet", "cache")
    }
    # of checkpoints and U-Nets there are two at the moment of writing; the rest of a pipeline is there once
    assert sizes["checkpoints"] / 2 == pytest.approx(written["checkpoints"], rel=0.1)
    assert sizes["pipeline"] == pytest.approx(written["pipeline"] + written["pipeline/unet"], rel=0.1)
    assert sizes["cache"] == pytest.approx(written["cache"], rel=0.25)


def test_captions_that_are_cut_are_counted(home: Path) -> None:
    edit_rows(home, lambda row: {**row, "text": row["text"] + " with red blue green heart pizza rocket cat face house"})
    found = look(home, until="captions")["captions"]
    assert found.state == "warning"
    assert "100.0% are cut" in found.message and "text.max_length" in found.message


def test_bad_rows_and_unknown_languages_end_it(home: Path) -> None:
    edit_rows(home, lambda row: {**row, "text": "красное сердце " + row["text"][:1]})
    found = look(home)
    assert problems(found) == ["stopped"] and found["stopped"].message.startswith("text.encoder: ")
    edit_rows(home, lambda row: {**row, "text": ""})
    findings = look(home)
    assert list(findings) == ["stopped"] and "metadata.jsonl row 1" in findings["stopped"].message


def test_near_duplicates_are_those_of_another_format_not_of_another_color(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    picture = Image.fromarray(noise).resize((64, 64), Image.Resampling.BICUBIC)
    again = io.BytesIO()
    picture.resize((96, 96), Image.Resampling.BICUBIC).save(again, "JPEG", quality=92)
    picture.save(tmp_path / "a.png")
    (tmp_path / "b.jpg").write_bytes(again.getvalue())
    Image.fromarray(np.asarray(picture)[..., ::-1].copy()).save(tmp_path / "c.png")  # the same shapes in other colors
    for name, text in (("a", "one"), ("b", "two"), ("c", "three")):
        (tmp_path / f"{name}.txt").write_text(text)
    pictures = read_captioned(tmp_path, holdout=0, progress=False)
    within, across = duplicates(pictures)
    assert not across
    assert [(str(pair.first.locator), str(pair.second.locator)) for pair in within] == [("a.png", "b.jpg")]


def test_the_command_prints_a_table_and_exits_with_1_on_problems(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = road.save_recipe(road.recipe(home, vae=str(home / "vae")), home / "recipe.yaml")
    with pytest.raises(SystemExit) as stopped:
        cli.main(["doctor", "--config", str(recipe), "optim.lr=1e-12"])
    assert stopped.value.code == 1
    said = capsys.readouterr().out
    assert re.search(r"^ok +U-Net disk ", said, re.M) and re.search(r"^problem +U-Net learning .*optim.lr", said, re.M)
    assert said.endswith("1 problem, 1 warning\n") and re.search("^warning +VAE ", said, re.M)  # nobody trained it
    with pytest.raises(SystemExit) as stopped:
        cli.main(["doctor", "--config", str(recipe), "optim.lrr=1"])
    assert stopped.value.code == 2
    assert "did you mean optim.lr?" in capsys.readouterr().err


def test_rows_left_out_are_named(home: Path) -> None:
    (home / "data/images/red_cat.png").write_bytes(b"no picture")
    found = look(home, until="data", data__on_bad="skip")["data"]
    assert found.state == "warning"
    assert "1 left out" in found.message and "red_cat.png" in found.message


def test_before_there_is_a_vae_both_trainings_are_tried(home: Path) -> None:
    findings = {found.check: found for found in examine(road.recipe(home))}
    assert not problems(findings)
    assert list(findings) == ["data", "leak", "captions", "VAE", *VAE, *UNET]
    assert "train_vae.py comes first" in findings["VAE"].message
    assert not (home / "run").exists()


@pytest.fixture
def steps_taken(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The steps of real runs; a trial's are not counted."""
    taken: list[int] = []
    record = Monitor.record

    def counted(self: Monitor, step: int, *rest: Any) -> None:
        taken.append(step)
        record(self, step, *rest)

    monkeypatch.setattr(Monitor, "record", counted)
    return taken


RUNS = {
    "VAE": (train_vae, {"vae_training__steps": 2}, "vae_training__lr"),
    "U-Net": (train_ldm, {"loop__steps": 2, "loop__sample_every": 0}, "optim__lr"),
    "classifier": (
        train_classifier,
        {"classifier_training__steps": 2, "data__label_column": "color", "classifier__channels": [8, 16]},
        "classifier_training__lr",
    ),
}


@pytest.mark.parametrize("name", RUNS)
def test_every_run_is_checked_before_its_first_step_and_not_again(
    name: str, home: Path, steps_taken: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    train, words, rate = RUNS[name]
    words = words | {"doctor": True} | ({} if name == "VAE" else {"vae": str(home / "vae")})
    with pytest.raises(ValueError, match=rf"set {rate.replace('__', '.')} higher .* doctor=false"):
        train(road.recipe(home, **words, **{rate: 1e-12}))
    assert not steps_taken and not list((home / "run").rglob("step_*"))
    assert re.search(rf"^problem +{name} learning", capsys.readouterr().out, re.M)

    losses = train(road.recipe(home, **words))
    assert steps_taken == [0, 1]
    assert re.search(rf"^ok +{name} learning", capsys.readouterr().out, re.M)
    assert losses == train(road.recipe(home, **words | {"doctor": False}, run=str(home / "blind")))

    train(road.recipe(home, **words))  # goes on from the last checkpoint
    assert "learning" not in capsys.readouterr().out


def test_without_memory_for_a_step_the_remedy_is_named(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def step(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB.")

    monkeypatch.setattr(Trainer, "step", step)
    found = look(home)["U-Net memory"]
    assert found.state == "problem"
    assert "loop.accumulation" in found.message and "20 GiB" in found.message
