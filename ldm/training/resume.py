"""Resume from the newest whole checkpoint, with the same mathematics unless the user allows a change.

Every config key counts unless it is known not to. Two kinds are known: HARMLESS keys can't change a single digit of
what is learned; ROUNDING keys change the order of floating-point sums and nothing else, which is allowed and reported.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from ldm.system.errors import RunError
from ldm.system.files import hold, typed_path
from ldm.training.checkpoint import checkpoints, circumstances, load_checkpoint, newest, step_of
from ldm.training.config import Config, to_dict
from ldm.training.distributed import on_rank_0
from ldm.training.objective import DiffusionConfig
from ldm.training.task import Samples
from ldm.training.train_state import TrainState

#: A key, or a section with a dot at its end.
HARMLESS = (
    "run",
    "doctor",
    "resume.",
    "data.workers",
    "loop.minutes",  # what follows from it counts
    "loop.log_every",
    "loop.sample_every",
    "loop.evaluate_every",
    "loop.checkpoint_every",
    "optim.ema_snapshot_every",
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
_LDM = (
    "text.",
    "unet.",
    "lora.",
    "distill.",
    "upscale.",
    "optim.",
    "data.condition_column",
    "data.inpaint",
    "data.buckets",
    "data.bucket_ratio",
    "loop.steps",
    "loop.half_size_steps",
    "loop.batch_size",
    "loop.accumulation",
    "loop.gradient_checkpointing",
    "loop.compile",
)
#: What each task doesn't read.
UNREAD = {
    "ldm": ("vae_model.", "vae_training.", "classifier.", "classifier_training.", "distill."),
    "distill": (
        *("vae_model.", "vae_training.", "classifier.", "classifier_training."),
        *("distill.steps", "diffusion.loss", "diffusion.weighting", "diffusion.timestep_sampling"),
    ),
    "vae": (
        *_LDM,
        "vae",
        "diffusion.",
        "classifier.",
        "classifier_training.",
        "data.cache",
        "data.label_column",
        "data.number_columns",
        "data.repeats_column",
    ),
    "classifier": (
        *_LDM,
        "data.repeats_column",
        "data.number_columns",
        "vae_model.",
        "vae_training.",
        *(
            f"diffusion.{item.name}"
            for item in dataclasses.fields(DiffusionConfig)
            if item.name not in ("schedule", "timesteps", "zero_terminal_snr")
        ),
    ),
}
#: Values that versions before a key had in effect, where that isn't today's default.
BEFORE = {"text.standardize": False}
ABSENT = "(absent)"
#: Keys that decide what is in a checkpoint, so that one of another value can't be loaded.
FIXED = ("optim.name", "optim.ema_widths")
PATHS = ("run", "init", "vae", "data.source", "data.cache", "text.encoder", "upscale.base")
#: What a change of something that is not in the config means.
MEANING = {
    "data": " (pictures, captions, classes or their order)",
    "encoders": " (weights or scale of the VAE or the text encoder)",
    "init_weights": " (of the U-Net that init names)",
    "upscale_base": " (the model that upscale.base names)",
}


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"optim": {"lr": 1}} => {"optim.lr": 1}"""
    found: dict[str, Any] = {}
    for name, value in tree.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return found


def one_spelling(values: dict[str, Any]) -> dict[str, Any]:
    """Flat values with their paths as a Config has them: earlier versions kept them as they were typed."""
    return {key: typed_path(value) if key in PATHS and value else value for key, value in values.items()}


def covers(names: Collection[str], key: str) -> bool:
    """Whether a key, or a section that it belongs to, is among the names."""
    return any(key == name or (name.endswith(".") and key.startswith(name)) for name in names)


def differences(
    old: Mapping[str, Any], new: Mapping[str, Any], task: str, facts: Mapping[str, tuple[Any, Any]], done: int
) -> dict[str, tuple[Any, Any]]:
    """The keys whose values differ and matter to a task (`ldm.training.run.TASKS`): key => (old, new).

    A key that the checkpoint's version did not have counts only if its value is not what that version did: today's
    default, or `BEFORE`.

    Args:
        old, new: configs as nested dicts.
        facts: what is not in the config, name => (old, new), such as the number of pictures.
        done: steps that were trained with the old config.
    """
    before, after, default = one_spelling(flat(old)), one_spelling(flat(new)), flat(to_dict(Config())) | BEFORE
    found = dict(facts)
    for key in dict.fromkeys([*before, *after]):
        was = before.get(key, default.get(key, ABSENT))
        found[key] = (was, after.get(key, ABSENT))
    if all(steady(config, done) for config in (before, after)):
        for key in ("loop.steps", "optim.cooldown"):
            found.pop(key, None)
    ignored = HARMLESS + UNREAD[task]
    return {key: pair for key, pair in found.items() if pair[0] != pair[1] and not covers(ignored, key)}


def steady(config: Mapping[str, Any], done: int) -> bool:
    """Whether the steps done so far would have been the same with another last step: the rate has not begun to fall."""
    last_steady = config.get("loop.steps", 0) - config.get("optim.cooldown", 0)
    return config.get("optim.decay") == "constant" and (not config.get("optim.cooldown") or done <= last_steady)


def check_changes(
    changed: Mapping[str, tuple[Any, Any]], allowed: Collection[str], where: object
) -> tuple[list[str], list[str]]:
    """The changes to report: those that only round otherwise, and those that were allowed.

    Raises:
        RunError: names every change that is neither, and how to allow it.
    """
    for key in FIXED:
        if key in changed:
            old, new = changed[key]
            raise RunError(
                f"resume: {where} was trained with {key}={old!r}, not {new!r}, and holds other things; change it back, "
                "or name another run="
            )
    refused = {key: pair for key, pair in changed.items() if key not in allowed and key not in ROUNDING}
    if refused:
        listed = "\n".join(f"  {key}: {old!r} => {new!r}{MEANING.get(key, '')}" for key, (old, new) in refused.items())
        raise RunError(
            f"resume: {where} was trained with other settings:\n{listed}\n"
            f"Change them back, name another run=, or allow it: 'resume.allow=[{','.join(refused)}]'"
        )
    lines = {key: f"{key} {old!r} => {new!r}" for key, (old, new) in changed.items()}
    return [lines[key] for key in lines if key in ROUNDING], [lines[key] for key in lines if key not in ROUNDING]


def data_facts(samples: Samples) -> dict[str, Any]:
    """What a checkpoint keeps of the data: the number of pictures, and a hash of all that samples take from each row.

    Pictures enter by the hash of their file, which is known since they were checked; none is read here.
    """
    pictures, digest = samples.pictures, hashlib.sha256()
    for number, row in enumerate(pictures):
        digest.update(json.dumps([row.content.hex(), samples.row_facts(number, row)]).encode())
    return {"pictures": len(pictures), "data": digest.hexdigest()[:16]}


def resume(
    folder: Path,
    task: str,
    train_state: Mapping[str, TrainState],
    accelerator: Accelerator,
    steps: int,
    config: dict[str, Any],
    facts: Mapping[str, Any],
) -> int:
    """Load the newest whole checkpoint in a task's folder, if there is one; returns how many steps are done.

    The run is locked from now on. Every rank must call it.

    Args:
        config: the run's, as nested dicts; `resume.allow` lists keys that may have changed.
        facts: of the data (`data_facts`).
    Raises:
        RunError: if the config or the data differ where it matters, or another process trains in this run.
    """

    def find(_: object) -> int:
        hold(Path(config["run"]))
        found = newest(folder)
        return 0 if found is None else 1 + step_of(found)

    step = on_rank_0(find) - 1
    if step < 0:
        return 0
    path = next(path for path in reversed(checkpoints(folder)) if step_of(path) == step)
    state = json.loads((path / "state.json").read_text("utf-8"))
    known = {name: (state["facts"][name], value) for name, value in facts.items() if name in state["facts"]}
    if known["pictures"][0] != known["pictures"][1]:
        known.pop("data", None)  # other data by their number already
    changed = differences(state["config"], config, task, known, step)
    rounding, allowed = check_changes(changed, config.get("resume", {}).get("allow", ()), path)
    for name, value in circumstances(accelerator).items():
        if state.get(name, value) != value:  # older checkpoints lack the precision
            rounding.append(f"{name} {state[name]} => {value}")
    load_checkpoint(path, train_state, accelerator)
    line = f"resuming from {path}, step {step} of {steps}"
    if allowed:
        line += f"; allowed: {', '.join(allowed)}"
    if rounding:
        line += f"; not exact to the last bit: {', '.join(rounding)}"
    accelerator.print(line)
    return step
