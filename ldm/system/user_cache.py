"""Folders that are made once on a machine and kept: $XDG_CACHE_HOME/ldm/NAME, by default in ~/.cache.

The manifest of a folder says what its files must hold; a damaged one is made anew. One process at a time makes or
reads a folder, the others wait for it.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ldm.system.files import sync
from ldm.system.hashing import fault, write_manifest


def user_cache(name: str) -> Path:
    """Where folders of this kind are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "ldm" / name


@contextmanager
def locked(entry: Path) -> Iterator[None]:
    """Inside, no other process is; a process that dies lets others in."""
    entry.parent.mkdir(parents=True, exist_ok=True)
    with entry.with_name(f"{entry.name}.lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def ensure(make: Callable[[Path], None], entry: Path, say: Callable[[str], None] = lambda _: None) -> None:
    """Make an entry that is absent or damaged, whole or not at all, whatever happens; `locked` must be held.

    Args:
        make: writes the files into an empty folder.
        say: is told of a damage.
    """
    if entry.exists() and (damage := fault(entry)):
        say(f"{entry}: {damage}; it is made anew")
        shutil.rmtree(entry)
    if entry.exists():
        return
    new = entry.with_name(f"{entry.name}.new")
    shutil.rmtree(new, ignore_errors=True)  # of a process that was killed
    new.mkdir()
    try:
        make(new)
        write_manifest(new)
        for path in [*new.iterdir(), new]:
            sync(path)
        new.rename(entry)
    finally:
        shutil.rmtree(new, ignore_errors=True)
