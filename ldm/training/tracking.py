"""What a run says of itself: log.jsonl always, TensorBoard if it is installed, pictures as PNG files."""

from __future__ import annotations

import importlib.util
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


class Tracker:
    """Writes every logged value to RUN/log.jsonl and RUN/tensorboard/. A silent one (other ranks) writes nothing."""

    def __init__(self, run: Path, *, silent: bool = False) -> None:
        self.run = run
        self.silent = silent
        self.board: Any = None
        if silent:
            return
        run.mkdir(parents=True, exist_ok=True)
        self.log = (run / "log.jsonl").open("a", encoding="utf-8")
        if importlib.util.find_spec("tensorboard"):
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(run / "tensorboard"))

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Log named numbers at a step."""
        if self.silent:
            return
        self.log.write(json.dumps({"step": step, "time": round(time.time(), 3), **values}) + "\n")
        self.log.flush()
        if self.board:
            for name, value in values.items():
                self.board.add_scalar(name, value, step)

    def picture(self, name: str, step: int, picture: Image.Image) -> Path | None:
        """Save RUN/<name>/step_<step>.png and show it in TensorBoard; returns its path."""
        if self.silent:
            return None
        path = self.run / name / f"step_{step:07d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path)
        if self.board:
            self.board.add_image(name, np.asarray(picture.convert("RGB")), step, dataformats="HWC")
        return path

    def close(self) -> None:
        if not self.silent:
            self.log.close()
            if self.board:
                self.board.close()
