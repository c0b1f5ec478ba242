"""Which configs a checkpoint may be resumed with."""

from __future__ import annotations

from typing import Any

import pytest

from ldm.cli.config import keys, parse_config
from ldm.system.errors import RunError
from ldm.training.checkpoint import digest
from ldm.training.config import Config, to_dict
from ldm.training.resume import HARMLESS, ROUNDING, UNREAD, check_changes, differences, flat


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


def test_the_vae_does_not_mind_what_it_does_not_read() -> None:
    assert changed("unet.layers=1", "loop.steps=3", "optim.lr=1", "vae=x", "loop.batch_size=8", task="vae") == {}
    assert list(changed("vae_model.layers=2", task="vae")) == ["vae_model.layers"]
    assert list(changed("data.flip=true", task="vae")) == ["data.flip"]


def test_a_key_that_the_older_version_did_not_know_counts_if_it_is_set() -> None:
    old, new = to_dict(Config()), to_dict(Config())
    del old["optim"]["clip"]
    assert differences(old, new, "ldm", {}, 0) == {}
    new["optim"]["clip"] = 2.0
    assert differences(old, new, "ldm", {}, 0) == {"optim.clip": (1.0, 2.0)}


def test_a_run_begun_before_contexts_were_standardized_is_not_gone_on_with_otherwise() -> None:
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
