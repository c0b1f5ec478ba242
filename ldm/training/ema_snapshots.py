"""Snapshots of the averages whose width is chosen after training, in step with the checkpoints."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

from ldm.models.ema_snapshots import FOLDER, drop_snapshots, write_snapshot
from ldm.training.checkpoint import DISK_ERRORS
from ldm.training.distributed import Tick, on_rank_0
from ldm.training.train_state import TrainState, averaged_weights


def keep_snapshot(run: Path, step: int, train_state: Mapping[str, TrainState]) -> None:
    """Write RUN/ema_snapshots/step_<step>, if anything keeps such averages. Every rank must call it.

    A full disk costs this snapshot, not the run: the others will do.
    """
    state = next(iter(train_state.values()))  # of the first network, which is exported
    if not state.powers:
        return
    averages = {width: averaged_weights(state.module, average) for width, average in state.powers.items()}

    def write(_: Tick) -> None:
        try:
            write_snapshot(run, step, averages)
        except DISK_ERRORS as error:
            print(
                f"\nwarning: the averages of step {step} could not be saved in {run / FOLDER}: {error}; training "
                "continues, and ldm evaluate --ema does without them",
                file=sys.stderr,
            )

    on_rank_0(write)


def drop_later_snapshots(run: Path, step: int, train_state: Mapping[str, TrainState]) -> None:
    """Delete the snapshots after the checkpoint that a run resumes from. Every rank must call it."""
    if next(iter(train_state.values())).powers:
        on_rank_0(lambda _: drop_snapshots(run, step))
