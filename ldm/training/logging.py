"""The log of a run: log.jsonl always, TensorBoard if it is installed, pictures as PNG files."""

from __future__ import annotations

import contextlib
import errno
import importlib.util
import json
import sys
import time
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


class Tracker:
    """Writes every logged value to RUN/log.jsonl and RUN/tensorboard/. A silent one (other ranks) writes nothing."""

    def __init__(self, run: Path, *, silent: bool = False) -> None:
        self.run = run
        self.silent = silent
        self.warned = False
        if silent:
            return
        run.mkdir(parents=True, exist_ok=True)
        cut_torn_line(run / "log.jsonl")

    @cached_property
    def board(self) -> Any:
        """TensorBoard's writer, made for the first values, since importing it takes a second; None without it."""
        if importlib.util.find_spec("tensorboard"):
            from torch.utils.tensorboard import SummaryWriter

            with self.tolerating("TensorBoard"):
                return SummaryWriter(str(self.run / "tensorboard"))
        return None

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Log named numbers at a step."""
        if self.silent:
            return
        self.line({"step": step, "time": round(time.time(), 3), **values})
        if self.board:
            with self.tolerating("TensorBoard"):
                for name, value in values.items():
                    self.board.add_scalar(name, value, step)

    def event(self, step: int, name: str, values: dict[str, Any]) -> None:
        """Log something that happened at a step: {"step": …, "event": name, …}."""
        if not self.silent:
            self.line({"step": step, "time": round(time.time(), 3), "event": name, **values})

    def line(self, values: dict[str, Any]) -> None:
        """Append a whole line to log.jsonl, or nothing."""
        path = self.run / "log.jsonl"
        with self.tolerating(path), path.open("ab", buffering=0) as log:
            start, line = log.seek(0, 2), (json.dumps(values) + "\n").encode()
            if log.write(line) != len(line):  # a disk that is nearly full takes a part
                log.truncate(start)
                raise OSError(errno.ENOSPC, "No space left on device")

    @contextlib.contextmanager
    def tolerating(self, what: object) -> Iterator[None]:
        """Inside, a full disk is a warning, once; it is no reason to stop training."""
        try:
            yield
        except OSError as error:
            if not self.warned:
                print(f"\nwarning: {what} could not be written: {error}; training continues", file=sys.stderr)
            self.warned = True

    def picture(self, name: str, step: int, picture: Image.Image) -> Path | None:
        """Save RUN/<name>/step_<step>.png and show it in TensorBoard; returns its path."""
        if self.silent:
            return None
        path = self.run / name / f"step_{step:07d}.png"
        with self.tolerating(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            picture.save(path)
            if self.board:
                self.board.add_image(name, np.asarray(picture.convert("RGB")), step, dataformats="HWC")
        return path

    def close(self) -> None:
        if vars(self).get("board"):
            with self.tolerating("TensorBoard"):
                self.board.close()


def cut_torn_line(path: Path) -> None:
    """Drop the end of a file after its last newline: a killed process was writing it."""
    if path.exists():
        with path.open("rb+") as file:
            file.truncate(file.read().rfind(b"\n") + 1)
