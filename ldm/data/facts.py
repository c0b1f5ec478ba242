"""What is known of each picture file, remembered by its stamp: a file is read and decoded once, not at every start.

A stamp is the file's name, inode, size and times (`rows.file_stamp`); while it stays the same, so does the file. A file
that changed within the last seconds is decoded again: the clock of a file system may be too coarse to separate two
changes of one moment (git's "racy" files).

Several ranks share the work through the store, without waiting for each other: each begins with its own share, then
takes what is still unknown, in a random order of its own. Ranks that can't see each other's results decode everything.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import struct
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ldm.data.cache.store import Kind
from ldm.data.cache.store import Store as Records
from ldm.data.cache.writer import Writer
from ldm.data.images import BadPictureError, decode
from ldm.data.rows import Store

SETTLED = 2.0  # seconds; the coarsest clock of a file system in use, FAT's
CHUNK = 64  # pictures that a rank looks at in one go
SAVE_SECONDS = 1.0  # how long facts wait to be stored
KIND = Kind("facts", {"decoder": 1})  # raise it when `decode` accepts other files, or gives other sizes
_HEAD = struct.Struct("<16sII")


@dataclass(frozen=True, slots=True)
class Fact:
    """What is known of a picture file.

    Attributes:
        content: 16 bytes that differ between any two contents; empty if the file can't be read.
        size: width and height in pixels, upright; (0, 0) if it can't be decoded.
        broken: why it can't be used, None if it can.
    """

    content: bytes
    size: tuple[int, int]
    broken: str | None = None

    def pack(self) -> bytes:
        """The fact as a record's payload."""
        return _HEAD.pack(self.content, *self.size) + (self.broken or "").encode()

    @classmethod
    def unpack(cls, payload: bytes) -> Fact:
        """The fact in a record's payload."""
        content, width, height = _HEAD.unpack_from(payload)
        return cls(content, (width, height), payload[_HEAD.size :].decode() or None)


UNKNOWN = Fact(b"", (0, 0))  # of a picture that was not looked at


def hash_content(data: bytes) -> bytes:
    """16 bytes that differ between any two contents."""
    return hashlib.blake2b(data, digest_size=16).digest()


def look_at(pictures: Store, locators: Sequence[Any], folder: Path | None, progress: bool = False) -> list[Fact]:
    """What is known of these pictures; those that are new or have changed are read and decoded, in threads.

    Args:
        folder: where facts are remembered, in a file that all ranks of a run share; None remembers nothing.
        progress: show a bar.
    """
    facts: list[Fact | None] = [None] * len(locators)
    memory = _Memory(folder, [_key(pictures, locator) if folder else None for locator in locators])
    memory.recall(facts, range(len(locators)))
    unknown = facts.count(None)
    with (
        warnings.catch_warnings(),
        tqdm(total=unknown, desc="checking pictures", unit="picture", disable=not progress or not unknown) as bar,
        ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads,
    ):
        warnings.filterwarnings("ignore", module=r"PIL\.")  # they name no file; what matters is reported
        for chunk in _in_turn(facts):
            memory.recall(facts, chunk)  # another rank may have looked meanwhile
            new = [number for number in chunk if facts[number] is None]
            now = time.time()  # before reading
            for number, fact in zip(new, threads.map(lambda n: _look(pictures, locators[n]), new), strict=True):
                facts[number] = fact
                memory.add(number, fact, now)
            bar.update(len(chunk))
    memory.save()
    return [fact for fact in facts if fact is not None]


class _Memory:
    """The store of facts, where there is one. It saves time alone, so nothing fails because of it."""

    def __init__(self, folder: Path | None, keys: Sequence[tuple[bytes, float] | None]) -> None:
        """Open the store in a folder. `keys` are those of the pictures, with the times when their files changed."""
        self._keys = keys
        self._new: list[tuple[bytes, bytes]] = []
        self._saved = time.monotonic()
        self._store: Records | None = None
        if folder is not None:
            with self._optional():
                path = folder / KIND.file
                with Writer(path, KIND, log=lambda line: None):  # which makes or repairs it
                    pass
                self._store = Records(path, KIND)

    def recall(self, facts: list[Fact | None], numbers: Sequence[int]) -> None:
        """Fill in those facts of `numbers` that are remembered and not known yet."""
        keys = [(n, self._keys[n]) for n in numbers if facts[n] is None]
        wanted = {n: key[0] for n, key in keys if key is not None}
        if self._store is None or not wanted:
            return
        with self._optional():
            found = self._store.get(list(set(wanted.values())))  # two rows may name one file
            for n, key in wanted.items():
                facts[n] = Fact.unpack(found[key]) if key in found else None

    def add(self, number: int, fact: Fact, now: float) -> None:
        """Remember a fact that was found at `now`, unless the file could have changed since without another stamp."""
        key = self._keys[number]
        if key is not None and fact.content and now - key[1] >= SETTLED:
            self._new.append((key[0], fact.pack()))
        if time.monotonic() - self._saved > SAVE_SECONDS:
            self.save()

    def save(self) -> None:
        """Commit what was added last."""
        new, self._new = self._new, []
        if self._store is not None and new:
            with self._optional():
                self._store.add(new)
        self._saved = time.monotonic()

    @contextlib.contextmanager
    def _optional(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self._store = None
            print(f"what is known of the pictures can't be remembered: {error}", file=sys.stderr)


def _look(pictures: Store, locator: Any) -> Fact:
    try:
        data = pictures.read(locator)
    except BadPictureError as error:
        return Fact(b"", (0, 0), str(error))
    try:
        return Fact(hash_content(data), decode(data).size)
    except BadPictureError as error:
        return Fact(hash_content(data), (0, 0), str(error))


def _key(pictures: Store, locator: Any) -> tuple[bytes, float] | None:
    """A picture's key and when its file changed, None if it has no stamp."""
    try:
        stamp = pictures.stamp(locator)
    except BadPictureError:
        return None
    return None if stamp is None else (KIND.key(stamp[0].encode()), stamp[1])


def _in_turn(facts: Sequence[Fact | None]) -> Iterator[list[int]]:
    """The numbers of the unknown facts in chunks: first this rank's share, then the others' chunks in random order."""
    rank, ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    chunks = [range(start, min(start + CHUNK, len(facts))) for start in range(0, len(facts), CHUNK)]
    begin, end = (len(chunks) * r // ranks for r in (rank, rank + 1))
    others = chunks[:begin] + chunks[end:]
    random.Random(rank).shuffle(others)
    for chunk in chunks[begin:end] + others:
        if unknown := [number for number in chunk if facts[number] is None]:
            yield unknown
