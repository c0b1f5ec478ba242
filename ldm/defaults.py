"""How a pipeline is drawn from when nobody says: `defaults.json` beside model_index.json.

    {"num_inference_steps": 20, "guidance_scale": 3.0}

Which settings suit a model is a property of the model, found by `ldm evaluate --sweep`, so they travel with it.
Stock diffusers doesn't look at the file.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

FILE = "defaults.json"


@dataclass(frozen=True)
class Defaults:
    """Settings of a drawing.

    Attributes:
        num_inference_steps: evaluations of the U-Net.
        guidance_scale: of classifier-free guidance; 1 is off.
    """

    num_inference_steps: int = 20
    guidance_scale: float = 3.0

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
        if not isinstance(said, dict) or not said.keys() <= kinds.keys():
            raise ValueError(f"{path}: expected an object with {' and '.join(kinds)}, got {str(said)[:100]}")
        for key, value in said.items():
            what = "a whole number" if kinds[key] is int else "a number"
            if not isinstance(value, kinds[key]) or isinstance(value, bool) or not value >= 0:
                raise ValueError(f"{path}: {key}: expected {what} of at least 0, got {value!r}")
        return cls(**said)

    def save(self, folder: Path) -> None:
        """Write them into a pipeline folder."""
        (folder / FILE).write_text(json.dumps(asdict(self), indent=2) + "\n", "utf-8")
