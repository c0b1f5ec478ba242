"""How a pipeline is drawn from when nobody says: `defaults.json` beside model_index.json.

    {"num_inference_steps": 20, "guidance_scale": 3.0, "guidance_interval": [0.0, 1.0]}

Which settings suit a model is a property of the model, found by `ldm evaluate --sweep`, so they travel with it.
Stock diffusers doesn't look at the file.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from numbers import Real
from pathlib import Path
from typing import Any

FILE = "defaults.json"
EVERYWHERE = (0.0, 1.0)
ENGINES = ("torch", "openvino")  # what may compute them


@dataclass(frozen=True)
class Defaults:
    """Settings of a drawing.

    Attributes:
        num_inference_steps: evaluations of the U-Net.
        guidance_scale: of classifier-free guidance; 1 is off.
        guidance_interval: low and high, fractions of the timesteps; outside of it there is no guidance.
    """

    num_inference_steps: int = 20
    guidance_scale: float = 3.0
    guidance_interval: tuple[float, float] = EVERYWHERE

    @classmethod
    def load(cls, folder: Path) -> Defaults:
        """What a pipeline folder says, or these defaults where it has no file or leaves a setting out.

        Raises:
            ValueError: for anything else in the file, naming file and key.
        """
        path = folder / FILE
        if not path.exists():
            return cls()
        try:
            said = json.loads(path.read_text("utf-8"))
        except ValueError as error:
            raise ValueError(f"{path}: expected JSON, got {error}") from None
        kinds: dict[str, Any] = {"num_inference_steps": int, "guidance_scale": (int, float)}
        keys = [*kinds, "guidance_interval"]
        if not isinstance(said, dict) or not said.keys() <= set(keys):
            raise ValueError(f"{path}: expected an object with {', '.join(keys)}, got {str(said)[:100]}")
        if "guidance_interval" in said:
            try:
                said["guidance_interval"] = check_interval("guidance_interval", said["guidance_interval"])
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from None
        for key, value in ((key, said[key]) for key in kinds if key in said):
            what = "a whole number" if kinds[key] is int else "a number"
            if not isinstance(value, kinds[key]) or isinstance(value, bool) or not value >= 0:
                raise ValueError(f"{path}: {key}: expected {what} of at least 0, got {value!r}")
        return cls(**said)

    def save(self, folder: Path) -> None:
        """Write them into a pipeline folder."""
        (folder / FILE).write_text(json.dumps(asdict(self), indent=2) + "\n", "utf-8")


def check_interval(name: str, value: Any) -> tuple[float, float]:
    """Two fractions, low before high => the same as floats; raises a ValueError for anything else, NaN included."""
    pair = list(value) if isinstance(value, list | tuple) else []
    if len(pair) != 2 or not all(isinstance(each, Real) and not isinstance(each, bool) for each in pair):
        raise ValueError(f"{name}: expected two numbers, LOW and HIGH, got {value!r}")
    if not 0 <= pair[0] < pair[1] <= 1:
        raise ValueError(f"{name}: expected 0 <= LOW < HIGH <= 1, fractions of the timesteps, got {value!r}")
    return float(pair[0]), float(pair[1])
