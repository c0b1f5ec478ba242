"""Which configs a checkpoint may be resumed with."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import road
import tiny
from PIL import Image

from ldm.cli.config import keys, parse_config
from ldm.data.conditioned import ConditionedPictures
from ldm.data.dataset import read_captioned
from ldm.system.errors import RunError
from ldm.training.checkpoint import digest
from ldm.training.config import Config, to_dict
from ldm.training.resume import HARMLESS, ROUNDING, UNREAD, check_changes, data_facts, differences, flat
from ldm.training.run import train
from ldm.training.samples import LatentSamples
from ldm.training.task import Samples
from ldm.training.tasks.autoencoder import PixelSamples
from ldm.training.tasks.classifier import LabeledSamples


def changed(*words: str, before: tuple[str, ...] = (), task: str = "ldm", done: int = 0) -> dict[str, tuple[Any, Any]]:
    old, new = (to_dict(parse_config(list(given))) for given in (before, [*before, *words]))
    return differences(old, new, task, {}, done)


def test_every_known_key_exists() -> None:
    known = [*keys(), *(f"{key.split('.')[0]}." for key in keys())]
    for name in [*HARMLESS, *ROUNDING, *UNREAD["ldm"], *UNREAD["vae"]]:
        assert name in known, name


@pytest.mark.parametrize(
    "word",
    ["run=elsewhere", "loop.log_every=7", "loop.prompts=[cat]", "loop.keep=9", "data.workers=0", "loop.steps=7",
     "resume.allow=[optim.lr]", "vae_training.lr=1", "vae_model.layers=3", "loop.sample_every=1"],
)  # fmt: skip
def test_what_changes_no_digit_is_not_a_change(word: str) -> None:
    assert changed(word) == {}


@pytest.mark.parametrize(
    "word",
    ["seed=1", "optim.lr=1", "optim.ema_decay=0.5", "loop.batch_size=8", "data.flip=true", "data.holdout=0.5",
     "diffusion.prediction=v", "diffusion.caption_dropout=0", "unet.layers=1", "text.max_length=5", "vae=other",
     "loop.precision=fp32", "data.source=other", "optim.clip=2", "optim.warmup=1"],
)  # fmt: skip
def test_what_changes_the_mathematics_is_refused_with_old_and_new(word: str) -> None:
    key = word.split("=")[0]
    found = changed(word)
    assert list(found) == [key]
    with pytest.raises(RunError) as refused:
        check_changes(found, (), "step_0000003")
    old, new = found[key]
    assert f"{key}: {old!r} => {new!r}" in str(refused.value)
    assert f"'resume.allow=[{key}]'" in str(refused.value)
    assert check_changes(found, (key,), "") == ([], [f"{key} {old!r} => {new!r}"])


def test_every_difference_is_named_at_once() -> None:
    found = changed("optim.lr=1", "seed=5", "loop.threads=3")
    with pytest.raises(RunError) as refused:
        check_changes(found, ("seed",), "")
    assert "optim.lr" in str(refused.value) and "seed" not in str(refused.value)
    rounding, allowed = check_changes(found, ("seed", "optim.lr"), "")
    assert rounding == ["loop.threads 0 => 3"] and len(allowed) == 2


def test_the_last_step_counts_where_the_learning_rate_depends_on_it() -> None:
    assert list(changed("loop.steps=7", before=("optim.decay=cosine",))) == ["loop.steps"]
    assert list(changed("loop.steps=7", "optim.decay=cosine")) == ["optim.decay", "loop.steps"] or set(
        changed("loop.steps=7", "optim.decay=cosine")
    ) == {"optim.decay", "loop.steps"}
    assert list(changed("vae_training.steps=7", task="vae")) == ["vae_training.steps"]


def test_a_cooldown_may_be_moved_until_it_has_begun() -> None:
    before = ("loop.steps=100", "optim.cooldown=20")
    assert changed("loop.steps=200", before=before, done=80) == {}
    assert changed("loop.steps=95", "optim.cooldown=15", before=before, done=80) == {}
    assert changed("loop.steps=200", "optim.cooldown=0", before=before, done=80) == {}
    assert list(changed("loop.steps=200", before=before, done=81)) == ["loop.steps"]  # it has begun
    assert list(changed("loop.steps=95", before=before, done=80)) == ["loop.steps"]  # it should have begun


def test_the_vae_ignores_keys_that_it_does_not_read() -> None:
    assert changed("unet.layers=1", "loop.steps=3", "optim.lr=1", "vae=x", "loop.batch_size=8", task="vae") == {}
    assert list(changed("vae_model.layers=2", task="vae")) == ["vae_model.layers"]
    assert list(changed("data.flip=true", task="vae")) == ["data.flip"]


def test_a_key_that_the_older_version_lacks_counts_if_it_is_set() -> None:
    old, new = to_dict(Config()), to_dict(Config())
    del old["optim"]["clip"]
    assert differences(old, new, "ldm", {}, 0) == {}
    new["optim"]["clip"] = 2.0
    assert differences(old, new, "ldm", {}, 0) == {"optim.clip": (1.0, 2.0)}


def test_a_run_begun_before_contexts_were_standardized_is_not_resumed_with_standardized_ones() -> None:
    old, new = to_dict(Config()), to_dict(Config())
    del old["text"]["standardize"]
    assert differences(old, new, "ldm", {}, 0) == {"text.standardize": (False, True)}
    new["text"]["standardize"] = False
    assert differences(old, new, "ldm", {}, 0) == {}


def test_another_number_of_pictures_is_a_change() -> None:
    config = to_dict(Config())
    found = differences(config, config, "ldm", {"pictures": (18, 19)}, 0)
    with pytest.raises(RunError, match="pictures: 18 => 19"):
        check_changes(found, (), "")


def test_the_digest_depends_on_values_not_on_order() -> None:
    config = to_dict(Config())
    again = {name: config[name] for name in reversed(config)}
    assert digest(config) == digest(again)
    assert digest(config) != digest({**config, "seed": 1})
    assert flat({"a": {"b": {"c": 1}}, "d": [2]}) == {"a.b.c": 1, "d": [2]}


def test_a_path_is_the_same_however_it_is_spelled() -> None:
    """Checkpoints of earlier versions have paths as they were typed."""
    old, new = to_dict(Config()), to_dict(Config())
    old["data"]["source"], new["data"]["source"] = "./data/openmoji/", "data/openmoji"
    old["vae"], new["vae"] = "~/vae/", str(Path("~/vae").expanduser())
    assert differences(old, new, "ldm", {}, 0) == {}
    new["data"]["source"] = "data/openmoji2"
    assert differences(old, new, "ldm", {}, 0) == {"data.source": ("data/openmoji", "data/openmoji2")}


# --- the data ---------------------------------------------------------------------------------------------


def edit(home: Path, change: Callable[[list[dict[str, Any]]], object]) -> None:
    file = home / "data/metadata.jsonl"
    rows = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
    change(rows)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


def permute(column: str) -> Callable[[Path], None]:
    """Give each of the first rows what the next one had."""

    def change(rows: list[dict[str, Any]]) -> None:
        values = [row[column] for row in rows[:6]]
        for row, value in zip(rows[:6], [*values[1:], values[0]], strict=True):
            row[column] = value

    return lambda home: edit(home, change)


def mirror(home: Path) -> None:
    for path in (home / "data/images").iterdir():
        with Image.open(path) as picture:
            picture.load()
        picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(path)


CHANGES = {
    "captions": (permute("text"), ("ldm",)),
    "classes": (permute("color"), ("ldm", "classifier")),
    "pictures": (mirror, ("ldm", "vae", "classifier")),
    "second pictures": (permute("outline"), ("ldm",)),
    "order": (lambda home: edit(home, lambda rows: rows.reverse()), ("ldm", "vae", "classifier")),
}


def facts_of(home: Path) -> dict[str, dict[str, Any]]:
    """What a checkpoint of each task would keep of these data."""
    config, shape = road.recipe(home, data__holdout=0), (4, 8, 8)
    source = ConditionedPictures.read(read_captioned(home / "data", holdout=0, progress=False), "color", "outline")
    pictures, ids = source.pictures, source.class_ids
    samples: dict[str, Samples] = {
        "vae": PixelSamples(pictures, config.data, 0, shape),
        "ldm": LatentSamples.of(config, source, shape),
        "classifier": LabeledSamples(pictures, ids, config.data, 0, 1000, shape, None),
    }
    return {task: data_facts(of_task) for task, of_task in samples.items()}


@pytest.mark.parametrize("name", CHANGES)
def test_a_checkpoint_keeps_a_hash_of_what_its_samples_take_from_the_data(tmp_path: Path, name: str) -> None:
    """A VAE does not mind other captions; nothing minds where the data are."""
    road.draw_folder(tmp_path / "home/data")
    before = facts_of(tmp_path / "home")
    assert before == facts_of((tmp_path / "home").rename(tmp_path / "moved"))
    change, minding = CHANGES[name]
    change(tmp_path / "moved")
    after = facts_of(tmp_path / "moved")
    assert {task for task in before if before[task] != after[task]} == set(minding)
    assert all(before[task]["pictures"] == after[task]["pictures"] == 24 for task in before)


def test_other_data_are_refused_until_they_are_allowed(tmp_path: Path) -> None:
    road.draw_folder(tmp_path / "data")
    words: dict[str, Any] = {"data__holdout": 0, "vae_training__checkpoint_every": 1}
    train("vae", road.recipe(tmp_path, vae_training__steps=2, **words))
    shutil.rmtree(tmp_path / "run/checkpoints/vae/step_0000002")
    mirror(tmp_path)
    with pytest.raises(RunError, match=r"(?s)\n  data: '\w+' => '\w+' \(pictures, captions.*'resume\.allow=\[data\]'"):
        train("vae", road.recipe(tmp_path, vae_training__steps=2, **words))
    assert len(train("vae", road.recipe(tmp_path, vae_training__steps=2, resume__allow=["data"], **words))) == 1
    # more pictures are another change, which says so by their number alone
    shutil.rmtree(tmp_path / "run/checkpoints/vae/step_0000002")
    Image.new("RGB", (tiny.SIZE, tiny.SIZE)).save(tmp_path / "data/images/new.png")
    edit(tmp_path, lambda rows: rows.append({"file_name": "images/new.png", "text": "nothing"}))
    with pytest.raises(RunError, match=r"\n  pictures: 24 => 25\nChange .*'resume\.allow=\[pictures\]'"):
        train("vae", road.recipe(tmp_path, vae_training__steps=2, **words))
