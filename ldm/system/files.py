"""Folders that are whole or absent, whatever happens to the process, the machine or the disk.

A folder is filled beside its final name, flushed to the disk file by file, and swapped in by a single rename.
What it replaces is deleted only after that.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import IO

from ldm.system.errors import NoSpaceError, RunError

AT_FDCWD, RENAME_EXCHANGE = -100, 2  # linux/fcntl.h, linux/fs.h
PATIENCE = 10.0  # seconds that a process which is just leaving is given
_held: dict[Path, IO[str]] = {}


def typed_path(text: str) -> str:
    """A path as people type it => its one spelling: `~` expanded, without ./ and a slash at the end; no URL is."""
    return text if not text or "://" in text else str(Path(os.path.expanduser(text)))


def temporary_beside(final: Path) -> Path:
    """An empty folder to fill before it takes the name of `final`; a killed process leaves it, and nothing reads it."""
    settle(final)
    temporary = final.with_name(f".{final.name}.new")
    temporary.mkdir(parents=True)
    return temporary


def put_in_place(temporary: Path, final: Path) -> None:
    """Flush a filled folder to the disk and give it its final name, where it replaces the old one."""
    flush(temporary)
    if not final.exists():
        temporary.rename(final)
    elif not exchange(temporary, final):
        final.rename(old_of(final))  # a folder can't be renamed onto another; `settle` repairs what is cut off here
        temporary.rename(final)
    sync(final.parent)
    settle(final)


def write_in_place(path: str | os.PathLike[str], data: bytes) -> None:
    """Give a file new content in one atomic step: whoever reads it finds the old bytes or the new ones, whole."""
    final = Path(os.path.realpath(path))  # a link stays one
    temporary = final.with_name(f".{final.name}.new")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    if final.exists():
        shutil.copymode(final, temporary)
    temporary.replace(final)
    sync(final.parent)


def settle(final: Path) -> None:
    """Finish or undo what a killed process left around a folder's name."""
    old = old_of(final)
    if old.exists() and not final.exists():
        old.rename(final)
    for left in (old, final.with_name(f".{final.name}.new")):
        shutil.rmtree(left, ignore_errors=True)


def link_or_copy(file: str | os.PathLike[str], to: str | os.PathLike[str]) -> None:
    """The same file under another name; a copy where the file system has no such links, or it is a link itself."""
    try:
        if os.path.islink(file):
            raise OSError("a relative link would lead elsewhere")
        os.link(file, to)
    except OSError:
        shutil.copy2(file, to)


def old_of(final: Path) -> Path:
    """Where a folder waits while another takes its name, on systems that can't exchange two names."""
    return final.with_name(f".{final.name}.old")


def exchange(one: Path, other: Path) -> bool:
    """Exchange two names in one atomic step (renameat2); False where the system or the file system can't."""
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "renameat2"):
        return False
    done: int = libc.renameat2(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE)
    return done == 0


def flush(folder: Path) -> None:
    """Make every file and folder below, and `folder` itself, survive a power cut."""
    for path in folder.rglob("*"):
        sync(path)
    sync(folder)


def check_room(folder: Path, needed: int) -> None:
    """Raise an OSError (ENOSPC) if the disk that `folder` lies on has not so many bytes free."""
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(errno.ENOSPC, f"{needed / 1e6:,.1f} MB are needed, {free / 1e6:,.1f} MB are free", str(folder))


def hold(run: Path) -> None:
    """Keep other processes out of a run's folder until this one ends, however it ends.

    Raises:
        RunError: if another process has it.
    """
    if run in _held:
        return
    run.mkdir(parents=True, exist_ok=True)
    file = (run / ".lock").open("w")
    until = time.monotonic() + PATIENCE
    while run not in _held:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                return file.close()  # a file system without locks
            if time.monotonic() > until:
                told = f"run: another process is training in {run}; wait for it, or name another folder"
                raise RunError(told) from None
            time.sleep(0.1)
        else:
            _held[run] = file


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


def check_writable(folder: Path) -> None:
    """Try to write into a folder, before hours or seconds are spent on what is to be written; nothing is left there.

    Args:
        folder: it needn't exist.
    Raises:
        ValueError: names the folder and the reason.
    """
    nearest = next(one for one in (folder, *folder.absolute().parents) if one.exists())
    try:
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError as error:
        raise ValueError(f"{folder}: can't be written to ({error.strerror}); name another folder") from None
