"""A disk that fills up in the middle of anything: the last checkpoint still loads, and the run says what happened."""

from __future__ import annotations

import contextlib
import errno
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from drills import Bench, Figures
from world import clean, newest_step, saved_in

from ldm.training import checkpoint

DISK = 64 << 20  # bytes


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[bool]:
    """A disk of its own at `folder`; False where we may not mount one."""
    folder.mkdir(parents=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(command, capture_output=True).returncode == 0
    except FileNotFoundError:
        mounted = False
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(folder)], check=True)


def leave_free(folder: Path, free: int) -> None:
    """Fill the disk until so many bytes are free."""
    with (folder / "ballast").open("wb") as file, contextlib.suppress(OSError):
        for size in (1 << 20, 1 << 12):
            while shutil.disk_usage(folder).free - free >= size:
                file.write(b"\0" * size)
                file.flush()


def without_asking() -> None:
    """The room was there when we looked, and another program took it: only writing finds out."""
    checkpoint.check_room = lambda folder, needed: None


def failing(count: int) -> Any:
    """Where nothing may be mounted: the n-th flush to the disk fails as on a full one."""

    def plant() -> None:
        import os

        flushed, original = 0, os.fsync

        def fsync(descriptor: int) -> None:
            nonlocal flushed
            flushed += 1
            if flushed == count:
                raise OSError(errno.ENOSPC, "No space left on device")
            original(descriptor)

        os.fsync = fsync

    return plant


def disk(bench: Bench, trials: int) -> Figures:
    """Resume from step 6 with ever more room, until there is enough; then make room and finish."""
    figures = Counter[str]()
    for name in ("checkpoints lost", "not clear", "losses that differ", "files that differ", "hangs"):
        figures[name] = 0
    kinds = ("cached", "vae", "classifier")
    prepared = {kind: prepare(bench, kind) for kind in kinds[:trials]}
    for trial in range(trials):
        kind = kinds[trial % len(kinds)]
        start = prepared[kind]
        size = sum(path.stat().st_size for path in start.rglob("*") if path.is_file())
        place = bench.world.home / f"disk-{trial}"
        with small_disk(place) as mounted:
            config = bench.world.recipe(kind, place / "run")
            with clean(config):
                shutil.copytree(start, config.run)
                if mounted:
                    leave_free(place, 7 * size * trial // (10 * trials))
                before = without_asking if trial % 3 or not mounted else lambda: None
                child = bench.world.train(kind, config, before=before if mounted else failing(1 + trial))
                code = child.wait()
                figures["hangs"] += code is None
                figures["ended with an error"] += code == 1
                figures["went through"] += code == 0
                if code not in (0, 1) or (code == 1 and not clear(child.words)):
                    figures["not clear"] += 1
                    print(trial, code, child.words[-3000:])
                figures["checkpoints lost"] += newest_step(kind, config) < 6
                (place / "ballast").unlink(missing_ok=True)
                child = bench.world.train(kind, config)
                if child.wait() != 0:
                    figures["errors"] += 1
                    print(child.words[-3000:])
                figures["trials"] += 1
                found = Counter[str]()
                bench.compare(kind, config, found)
                found["losses that differ"] = 0  # lines that found no room; the weights say what was computed
                figures += found
        figures["on a disk of its own"] += mounted
    for name in ("checkpoints lost", "not clear", "files that differ", "hangs", "errors"):
        figures[name] += 0
    return figures


def prepare(bench: Bench, kind: str) -> Path:
    """A run of this kind whose newest checkpoint is that of step 6."""
    bench.reference(kind)
    config = bench.world.recipe(kind, bench.world.home / f"prepared-{kind}", loop__keep=9)
    child = bench.world.train(kind, config)
    assert child.wait() == 0, child.words
    for late in checkpoint.checkpoints(saved_in(kind, config)):
        if checkpoint.step_of(late) > 6:
            shutil.rmtree(late)
    return Path(config.run)


def clear(words: str) -> bool:
    """Whether the last line says, as our error, that there was no room."""
    last = words.splitlines()[-1]
    return last.startswith("error: ") and (
        "could not be saved" in last or "No space left" in last or "are free" in last
    )
