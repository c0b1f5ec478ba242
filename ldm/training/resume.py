"""May a checkpoint of one config be resumed with another? Only if the mathematics stays, or if the user says so.

Every key counts unless it is known not to. Two kinds are known: HARMLESS keys can't change a single digit of what
is learned; ROUNDING keys change the order of floating-point sums and nothing else, which is allowed and told.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Collection, Mapping
from typing import Any

from ldm.system.errors import RunError
from ldm.training.config import Config, to_dict
from ldm.training.objective import DiffusionConfig

#: A key, or a section with a dot at its end.
HARMLESS = (
    "run",
    "doctor",
    "resume.",
    "data.workers",
    "loop.log_every",
    "loop.sample_every",
    "loop.evaluate_every",
    "loop.checkpoint_every",
    "loop.evaluation_pictures",
    "loop.keep",
    "loop.prompts",
    "loop.guidance_scale",
    "loop.num_inference_steps",
    "loop.max_skipped",
    "loop.spike",
    "vae_training.log_every",
    "vae_training.checkpoint_every",
    "classifier_training.log_every",
    "classifier_training.checkpoint_every",
)
ROUNDING = ("loop.threads", "loop.accumulation", "loop.gradient_checkpointing", "loop.compile", "data.cache")

#: What only the U-Net's training reads.
_UNETS = (
    "text.",
    "unet.",
    "optim.",
    "data.condition_column",
    "loop.steps",
    "loop.batch_size",
    "loop.accumulation",
    "loop.gradient_checkpointing",
    "loop.compile",
)
#: What each of the trainings doesn't read.
UNREAD = {
    "unet": ("vae_model.", "vae_training.", "classifier.", "classifier_training."),
    "vae": (*_UNETS, "vae", "diffusion.", "classifier.", "classifier_training.", "data.cache", "data.label_column"),
    "classifier": (
        *_UNETS,
        "vae_model.",
        "vae_training.",
        *(
            f"diffusion.{item.name}"
            for item in dataclasses.fields(DiffusionConfig)
            if item.name not in ("schedule", "timesteps", "zero_terminal_snr")
        ),
    ),
}
#: What versions did that did not know the key yet, where it isn't today's default.
BEFORE = {"text.standardize": False}
ABSENT = "(absent)"


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"optim": {"lr": 1}} => {"optim.lr": 1}"""
    found: dict[str, Any] = {}
    for name, value in tree.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return found


def digest(config: Mapping[str, Any]) -> str:
    """The SHA-256 of a config's canonical JSON, in hex."""
    return hashlib.sha256(json.dumps(config, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def covers(names: Collection[str], key: str) -> bool:
    """Whether a key, or a section that it belongs to, is among the names."""
    return any(key == name or (name.endswith(".") and key.startswith(name)) for name in names)


def differences(
    old: Mapping[str, Any], new: Mapping[str, Any], trained: str, facts: Mapping[str, tuple[Any, Any]], done: int
) -> dict[str, tuple[Any, Any]]:
    """The keys whose values differ and matter to what is trained ("unet", "vae" or "classifier"): key => (old, new).

    A key that the checkpoint's version did not know counts only if it is not what that version did: today's default,
    or `BEFORE`.

    Args:
        old, new: configs as nested dicts.
        facts: what the config does not say, name => (old, new): the number of pictures.
        done: steps that were trained with the old config.
    """
    before, after, default = flat(old), flat(new), flat(to_dict(Config())) | BEFORE
    found = dict(facts)
    for key in dict.fromkeys([*before, *after]):
        was = before.get(key, default.get(key, ABSENT))
        found[key] = (was, after.get(key, ABSENT))
    if all(steady(config, done) for config in (before, after)):
        for key in ("loop.steps", "optim.cooldown"):
            found.pop(key, None)
    ignored = HARMLESS + UNREAD[trained]
    return {key: pair for key, pair in found.items() if pair[0] != pair[1] and not covers(ignored, key)}


def steady(config: Mapping[str, Any], done: int) -> bool:
    """Whether the steps done so far would have been the same with another last step: the rate has not begun to fall."""
    last_steady = config.get("loop.steps", 0) - config.get("optim.cooldown", 0)
    return config.get("optim.decay") == "constant" and (not config.get("optim.cooldown") or done <= last_steady)


def check_changes(
    changed: Mapping[str, tuple[Any, Any]], allowed: Collection[str], where: object
) -> tuple[list[str], list[str]]:
    """The changes to tell of: those that only round otherwise, and those that were allowed.

    Raises:
        RunError: names every change that is neither, and how to allow it.
    """
    refused = {key: pair for key, pair in changed.items() if key not in allowed and key not in ROUNDING}
    if refused:
        listed = "\n".join(f"  {key}: {old!r} => {new!r}" for key, (old, new) in refused.items())
        raise RunError(
            f"resume: the config is not the one of {where}:\n{listed}\n"
            f"Take this back, name another run=, or allow it: 'resume.allow=[{','.join(refused)}]'"
        )
    told = {key: f"{key} {old!r} => {new!r}" for key, (old, new) in changed.items()}
    return [told[key] for key in told if key in ROUNDING], [told[key] for key in told if key not in ROUNDING]
