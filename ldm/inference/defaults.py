"""Sampling settings that travel with a model: `defaults.json` beside model_index.json.

    {"num_inference_steps": 20, "guidance_scale": 3.0, "guidance_interval": [0.0, 1.0]}

Which settings suit a model is a property of the model; `ldm evaluate --sweep` finds them. They apply as a set, to a
call that names none of them. Once a call names steps or guidance, all others are those of stock diffusers, which
doesn't read the file: the same words then give the same picture there.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from numbers import Real
from pathlib import Path
from typing import Any, Self

FILE = "defaults.json"
EVERYWHERE = (0.0, 1.0)
#: What a stock pipeline does with a call that doesn't name them.
STOCK_STEPS, STOCK_GUIDANCE_SCALE = 50, 7.5
AUTOGUIDANCE_SCALE = 2.0  # of a call that names a weaker model and no scale
ENGINES = ("torch", "openvino")  # that may compute U-Net and VAE decoder
#: Names of samplers; ldm.inference.samplers says what they are.
SAMPLERS = (
    "ddpm", "ddim", "dpm++", "dpm++sde", "unipc", "euler", "euler-a", "heun", "lms", "pndm", "deis", "pc", "ode", "lcm"
)  # fmt: skip


@dataclass(frozen=True)
class Defaults:
    """Sampling settings.

    Attributes:
        num_inference_steps: sampling steps.
        guidance_scale: of classifier-free guidance; 1 is off.
        guidance_interval: low and high, fractions of the timesteps; there is no guidance outside.
    """

    num_inference_steps: int = 20
    guidance_scale: float = 3.0
    guidance_interval: tuple[float, float] = EVERYWHERE

    def resolve(
        self,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        guidance_interval: Sequence[float] | None = None,
    ) -> Defaults:
        """The settings of a call: these if it names none, else the named ones beside those of stock diffusers.

        Raises:
            ValueError: for an interval that is none.
        """
        if num_inference_steps is None and guidance_scale is None and guidance_interval is None:
            return self
        return Defaults(
            STOCK_STEPS if num_inference_steps is None else num_inference_steps,
            STOCK_GUIDANCE_SCALE if guidance_scale is None else guidance_scale,
            EVERYWHERE if guidance_interval is None else check_interval("guidance_interval", guidance_interval),
        )

    @classmethod
    def load(cls, folder: Path) -> Self:
        """The settings in a pipeline folder, or these defaults where it has no file or the file lacks a setting.

        Raises:
            ValueError: for anything else in the file, naming file and key.
        """
        path = folder / FILE
        if not path.exists():
            return cls()
        try:
            settings = json.loads(path.read_text("utf-8"))
        except ValueError as error:
            raise ValueError(f"{path}: expected JSON, got {error}") from None
        kinds: dict[str, Any] = {"num_inference_steps": int, "guidance_scale": (int, float)}
        keys = [*kinds, "guidance_interval"]
        if not isinstance(settings, dict) or not settings.keys() <= set(keys):
            raise ValueError(f"{path}: expected an object with {', '.join(keys)}, got {str(settings)[:100]}")
        if "guidance_interval" in settings:
            try:
                settings["guidance_interval"] = check_interval("guidance_interval", settings["guidance_interval"])
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from None
        for key, value in ((key, settings[key]) for key in kinds if key in settings):
            what = "a whole number" if kinds[key] is int else "a number"
            if not isinstance(value, kinds[key]) or isinstance(value, bool) or not value >= 0:
                raise ValueError(f"{path}: {key}: expected {what} of at least 0, got {value!r}")
        return cls(**settings)

    def save(self, folder: Path) -> None:
        """Write them into a pipeline folder."""
        (folder / FILE).write_text(json.dumps(asdict(self), indent=2) + "\n", "utf-8")


def check_sampler(key: str, name: Any) -> None:
    """Raise a ValueError, naming the nearest, unless there is a sampler of this name."""
    if name not in SAMPLERS:
        near = difflib.get_close_matches(str(name), SAMPLERS, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"{key}: expected one of {', '.join(SAMPLERS)}, got {name!r}{hint}")


def check_interval(name: str, value: Any) -> tuple[float, float]:
    """Two fractions, low before high => the same as floats; raises a ValueError for anything else, NaN included."""
    pair = list(value) if isinstance(value, list | tuple) else []
    if len(pair) != 2 or not all(isinstance(each, Real) and not isinstance(each, bool) for each in pair):
        raise ValueError(f"{name}: expected two numbers, LOW and HIGH, got {value!r}")
    if not 0 <= pair[0] < pair[1] <= 1:
        raise ValueError(f"{name}: expected 0 <= LOW < HIGH <= 1, fractions of the timesteps, got {value!r}")
    return float(pair[0]), float(pair[1])
