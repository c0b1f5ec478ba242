"""What is refused before anything runs, in one line that names the key, whatever the command."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import road
import tiny

from ldm.models.vae import VAEConfig, build_vae
from ldm.training.config import Config
from ldm.training.doctor.examine import examine
from ldm.training.run import train


def doctor(config: Config) -> None:
    """`ldm doctor`, whose last finding is raised as the trainings raise theirs."""
    *_, last = examine(config)
    assert last.state == "problem"
    raise ValueError(last.message)


ENTRIES: dict[str, Callable[[Config], object]] = {
    **{task: partial(train, task) for task in ("vae", "ldm", "distill", "classifier")},
    "doctor": doctor,
}

#: config words => for which entries, and what their one line says.
SIZES: dict[str, tuple[dict[str, Any], tuple[str, ...], str]] = {
    "a VAE of 5 levels": (
        {"data__size": 72, "vae_model__channels": [8] * 5}, ("vae", "ldm", "doctor"),
        r"^data\.size: 72 does not fit: the VAE's 5 levels need a multiple of 16 \(vae_model\.channels\); the U-Net's "
        r"2 levels need a multiple of 32 \(unet\.channels\)\. Set data\.size to 64 or 96, or take fewer levels$",
    ),
    "a U-Net of 3 levels": (
        {"data__size": 40, "unet__channels": [32] * 3, "unet__attention": [False] * 3, "vae_model__channels": [8] * 3},
        ("vae", "ldm", "doctor"),
        r"^data\.size: 40 does not fit: the U-Net's 3 levels need a multiple of 16 \(unet\.channels\)\. Set data\.size "
        r"to 32 or 48, or take fewer levels$",
    ),
    "steps at half the size": (
        {"data__size": 16, "unet__channels": [32] * 4, "unet__attention": [False] * 4, "loop__half_size_steps": 2},
        ("vae", "ldm", "doctor"),
        r"^data\.size: 16 does not fit: steps at half the size need a multiple of 32 \(loop\.half_size_steps=0 has "
        r"none\)\. Set data\.size to 32, or take fewer levels$",
    ),
    "a classifier of 4 levels": (
        {"data__size": 8, "data__label_column": "color", "classifier__channels": [8] * 4}, ("classifier",),
        r"^data\.size: 8 does not fit: the classifier's 4 levels need at least 16 \(classifier\.channels\)\. Set "
        r"data\.size to 16, or take fewer levels$",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SIZES)
def test_sizes_that_do_not_fit_are_refused_before_a_picture_is_read(tmp_path: Path, name: str) -> None:
    """All of them in one line; there are no pictures, no VAE and no text encoder here to get further with."""
    words, entries, told = SIZES[name]
    for entry in entries:
        with pytest.raises(ValueError, match=told):
            ENTRIES[entry](road.recipe(tmp_path, **words))
    assert not (tmp_path / "run").exists()


def test_the_size_must_fit_a_vae_that_is_there(tmp_path: Path) -> None:
    build_vae(VAEConfig(channels=(8, 8, 8, 8, 8))).save_pretrained(tmp_path / "vae")
    for words in ({"vae": str(tmp_path / "vae")}, {"run": str(tmp_path)}):  # named, or trained in this run
        with pytest.raises(ValueError, match=r"data\.size: 72 does not fit: the VAE's 5 levels need a multiple of 16"):
            train("ldm", road.recipe(tmp_path, data__size=72, **words))


@pytest.mark.parametrize("entry", ENTRIES)
def test_pictures_that_are_all_held_out_are_one_line_that_names_the_key(tmp_path: Path, entry: str) -> None:
    """The split is by the hash of the caption: one caption, one split."""
    road.draw_folder(tmp_path / "data")
    tiny.save_text_encoder(tmp_path / "text", "bert")
    if entry == "distill":
        tiny.pipeline(tmp_path / "encoder").save_pretrained(tmp_path / "model")
    file = tmp_path / "data/metadata.jsonl"
    rows = [{**json.loads(line), "text": "face"} for line in file.read_text("utf-8").splitlines()]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    with pytest.raises(ValueError, match=r"all 24 pictures of .*'face'.* are held out; lower data\.holdout") as refused:
        teacher = {"init": str(tmp_path / "model"), **road.OF_INIT}
        words = teacher if entry == "distill" else {"data__label_column": "color"}
        ENTRIES[entry](road.recipe(tmp_path, data__holdout=0.9, **words))
    assert len(str(refused.value).splitlines()) == 1


def test_previews_take_at_most_the_steps_that_there_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        road.recipe(tmp_path, diffusion__timesteps=10, loop__num_inference_steps=20)
    said = capsys.readouterr().err
    assert "loop.num_inference_steps: expected at most diffusion.timesteps=10, got 20" in said
    assert len(said.splitlines()) == 1
    for timesteps, steps in ((10, 10), (1000, 20)):
        assert (
            road.recipe(tmp_path, diffusion__timesteps=timesteps, loop__num_inference_steps="null").preview_steps
            == steps
        )
    road.draw_folder(tmp_path / "data")
    tiny.save_text_encoder(tmp_path / "text", "bert")
    tiny.pipeline(tmp_path / "pipeline").vae.save_pretrained(tmp_path / "vae")
    words = {"vae": str(tmp_path / "vae"), "diffusion__timesteps": 5, "loop__num_inference_steps": "null"}
    train("ldm", road.recipe(tmp_path, loop__steps=1, **words))
    assert (tmp_path / "run/samples/step_0000001.png").exists()


def test_an_unknown_task_is_refused() -> None:
    with pytest.raises(ValueError, match="task: expected one of vae, ldm, distill, classifier, got 'unet'"):
        train("unet", Config())


@pytest.mark.parametrize(
    ("task", "words", "message"),
    [
        ("ldm", {"distill__steps": 4}, "distill.steps: a student is trained by `ldm train distill`"),
        ("vae", {"vae": "models/emoji"}, "vae: models/emoji is a pretrained VAE, so there is none to train"),
    ],
)
def test_a_recipe_of_another_task_is_refused(tmp_path: Path, task: str, words: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train(task, road.recipe(tmp_path, **words))
    assert not (tmp_path / "run").exists()


def test_a_vae_that_is_nowhere_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="my_model: there is no such folder, and none of this name comes from"):
        train("ldm", road.recipe(tmp_path, vae="my_model"))
