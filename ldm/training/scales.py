"""What a frozen encoder says, measured once in a run and kept in RUN: the mean and std of each of its channels.

Measured anew at each start, what the U-Net sees would change when pictures are added.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Scale:
    """Mean and std of each channel, float64 [C], in a file.

    Attributes:
        file: where they are kept, as JSON.
        facts: what they depend on; with other facts they are not these.
    """

    file: Path
    facts: Mapping[str, Any]

    def read(self) -> tuple[Tensor, Tensor] | None:
        """Mean and std, if they have been measured and are about the same facts."""
        try:
            told = json.loads(self.file.read_text("utf-8"))
            mean, std = (torch.tensor(told.pop(name), dtype=torch.float64) for name in ("mean", "std"))
        except (OSError, ValueError, KeyError):
            return None
        return (mean, std) if told == dict(self.facts) else None

    def require(self, what: str) -> tuple[Tensor, Tensor]:
        """Mean and std.

        Args:
            what: the config's key and value, for the message.
        Raises:
            ValueError: if they have not been measured.
        """
        found = self.read()
        if found is None:
            raise ValueError(f"{what}: {self.file} is not about it; start the run again")
        return found

    def keep(self, measure: Callable[[], tuple[Tensor, Tensor]]) -> None:
        """Measure unless it was done."""
        if self.read() is not None:
            return
        mean, std = measure()
        self.file.parent.mkdir(parents=True, exist_ok=True)
        new = self.file.with_name(f".{self.file.name}.new")
        new.write_text(json.dumps({**self.facts, "mean": mean.tolist(), "std": std.tolist()}, indent=2) + "\n", "utf-8")
        new.rename(self.file)
