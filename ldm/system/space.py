"""Room on the disk, asked for before it is needed."""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path


class NoSpaceError(OSError):
    """The disk is too small for what is to be stored."""


def check_space(folder: Path, needs: dict[str, int]) -> None:
    """Raise NoSpaceError unless what is needed, bytes by what for, fits on the disk."""
    if sum(needs.values()) > shutil.disk_usage(folder).free:
        raise NoSpaceError(no_space(folder, needs))


def no_space(folder: Path, needs: dict[str, int]) -> str:
    """What to say where bytes, by what they are for, don't fit."""
    free = 0
    with contextlib.suppress(OSError):
        free = shutil.disk_usage(folder).free
    shares = ", ".join(f"{gib(size)} for {what}" for what, size in needs.items() if size)
    return (
        f"data.cache: {folder} needs {gib(sum(needs.values()))} more ({shares}), {gib(free)} are free; make room, set "
        "data.cache=<folder on a larger disk>, or data.cache=off to store nothing and encode at every step"
    )


def gib(size: int) -> str:
    """`1.25 GiB`, `3.1 MiB`."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


def sync(path: Path) -> None:
    """Make one file, or one folder's list of names, outlive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
