"""Adding records to a store, so that a process may be killed at any instant.

Records are appended and synced to disk; then a new index is written beside the old one, and the manifest that names
it takes the old manifest's place by a rename. Until then the new records don't exist: what follows the last committed
record is written over by the next writer. Committed records are never moved, so others may read the store meanwhile.

A store that fails a check on opening is not thrown away: every record carries its key and sum, so the index is made
anew from those that are whole, and only the lost ones are computed again.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import itertools
import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from ldm.data.cache.records import (
    DAMAGED,
    KEY,
    MANIFEST,
    NUMBER,
    RECORDS,
    DamagedError,
    Keys,
    Kind,
    Manifest,
    Numbers,
    Records,
    locate,
    sum_of,
    to_keys,
)
from ldm.system.errors import NoSpaceError
from ldm.system.files import no_space, sync

COMMIT_SECONDS = 30.0  # a killed process loses at most this much work
LOCK = "lock"

T = TypeVar("T")
Say = Callable[[str], object]
Tick = Callable[[], None]


class Writer:
    """The only process that may add to a store; use it in a `with`, which commits on leaving, errors included."""

    def __init__(self, folder: Path, kind: Kind, say: Say = print, tick: Tick = lambda: None) -> None:
        """Open or make a store.

        Args:
            say: told in a line if the store is damaged and what became of it.
            tick: called every now and then while waiting or working.
        """
        self.folder, self.kind, self._say, self.tick = folder, kind, say, tick
        self.keys: Keys = to_keys(b"")
        self.numbers: Numbers = np.zeros(0, np.int64)
        self.records = 0
        self._new = bytearray()  # keys of the records that aren't committed yet
        self._last_commit = time.monotonic()

    def __enter__(self) -> Writer:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = (self.folder / LOCK).open("w")
        self._wait_for_lock()
        try:
            self._open()
        except DamagedError as damage:
            self._mend(str(damage))
        self._file = (self.folder / RECORDS).open("r+b", buffering=0)
        return self

    def __exit__(self, kind: object, *error: object) -> None:
        try:
            self.commit()
        except OSError:
            if kind is None:  # else what has happened already is the news
                raise
        finally:
            self._file.close()
            self._lock.close()

    def _wait_for_lock(self) -> None:
        told = False
        while True:
            try:
                return fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if not told:
                    self._say(f"cache: waiting for another process that is writing {self.folder}")
                told = True
                time.sleep(0.2)
                self.tick()

    def _open(self) -> None:
        manifest = Manifest.read(self.folder, self.kind)
        index = self.folder / manifest.index
        if sum_of(index) != manifest.index_sum:
            raise DamagedError(f"{manifest.index} is damaged")
        data = index.read_bytes()
        self.keys = np.frombuffer(data, KEY, manifest.indexed)
        self.numbers = np.frombuffer(data, NUMBER, manifest.indexed, manifest.indexed * KEY.itemsize)
        self.records = manifest.records

    def _mend(self, reason: str) -> None:
        """Make the index from the records that are whole."""
        size = self.kind.record.itemsize
        (self.folder / RECORDS).touch()
        self.records = (self.folder / RECORDS).stat().st_size // size
        if self.records or (self.folder / MANIFEST).exists():
            keys, numbers = bytearray(), []
            with (self.folder / RECORDS).open("rb") as file:
                for number in tqdm(range(self.records), "checking records", unit="record", leave=False, delay=2):
                    record = file.read(size)
                    if self.kind.whole(record):
                        keys += record[: KEY.itemsize]
                        numbers.append(number)
                    self.tick()
            self._index(to_keys(bytes(keys)), np.array(numbers, np.int64))
            kept = f"{len(numbers):,} of its {self.records:,} records are whole and stay"
            self._say(f"cache: {self.folder}: {reason}; {kept if numbers else 'it is made anew'}")
            if not numbers:
                (self.folder / RECORDS).unlink()  # not cut: someone may have mapped it
                (self.folder / RECORDS).touch()
                self.records = 0
        self._commit()
        (self.folder / DAMAGED).unlink(missing_ok=True)

    def _index(self, keys: Keys, numbers: Numbers) -> None:
        order = np.argsort(keys, kind="stable")
        self.keys, self.numbers = keys[order], numbers[order]

    def find(self, keys: Keys) -> Numbers:
        """The numbers of the committed records with these keys [N]; -1 where there is none."""
        return locate(self.keys, self.numbers, keys)

    def missing(self, keys: Keys) -> Numbers:
        """Where in `keys` those stand that have no record, each key once, in order."""
        first = np.unique(keys, return_index=True)[1]
        first.sort()
        places: Numbers = first[self.find(keys[first]) < 0]
        return places

    def reader(self) -> Records:
        """The store as it was last committed."""
        return Records(self.folder, self.kind)

    def append(self, keys: Keys, payloads: npt.NDArray[Any]) -> None:
        """Add records, [N] and [N, *shape], and commit them if the last commit is a while ago."""
        packed = memoryview(self.kind.pack(keys, payloads))
        with self._told_if_full(len(packed)):
            self._file.seek((self.records + len(self._new) // KEY.itemsize) * self.kind.record.itemsize)
            while packed:
                packed = packed[self._file.write(packed) :]
        self._new += keys.tobytes()
        if time.monotonic() - self._last_commit > COMMIT_SECONDS:
            self.commit()
        self.tick()

    def commit(self) -> None:
        """Make everything that was appended last."""
        if not self._new:
            return
        new = to_keys(bytes(self._new))
        self._new.clear()
        numbers = np.arange(self.records, self.records + len(new))
        self._index(np.concatenate([self.keys, new]), np.concatenate([self.numbers, numbers]))
        self.records += len(new)
        with self._told_if_full(len(self.keys) * (KEY.itemsize + NUMBER.itemsize)):
            os.fsync(self._file.fileno())
            self._commit()
        self._last_commit = time.monotonic()

    def _commit(self) -> None:
        before = {path.name for path in self.folder.glob("index-*.raw")}
        new = self.folder / "index.new"
        _write(new, self.keys.tobytes(), self.numbers.astype(NUMBER).tobytes())
        manifest = Manifest(self.records, len(self.keys), sum_of(new))
        new.rename(self.folder / manifest.index)
        _write(self.folder / "manifest.new", manifest.to_json(self.kind).encode())
        (self.folder / "manifest.new").rename(self.folder / MANIFEST)
        sync(self.folder)
        # the index before this one stays for those who have just read the old manifest
        for name in sorted(before - {manifest.index}, key=lambda name: (self.folder / name).stat().st_mtime_ns)[:-1]:
            (self.folder / name).unlink()

    @contextlib.contextmanager
    def _told_if_full(self, size: int) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            raise NoSpaceError(no_space(self.folder, {self.kind.name: size})) from None


def _write(path: Path, *parts: bytes) -> None:
    with path.open("wb") as file:
        file.writelines(parts)
        file.flush()
        os.fsync(file.fileno())


def fill(
    writer: Writer,
    keys: Keys,
    load: Callable[[int], T],
    encode: Callable[[list[T]], npt.NDArray[Any]],
    *,
    doing: str,
    unit: str,
    batch_size: int = 32,
    progress: bool = True,
) -> None:
    """Compute the records that are missing, each once, in order and in batches.

    A build that was killed goes on at a batch's edge, so it makes the very batches that one without a break makes.

    Args:
        keys: [N] of all the records that are wanted.
        load: number in `keys` => what to encode; called in threads, a batch ahead.
        encode: a batch of that => payloads [B, *shape].
    """
    missing = writer.missing(keys)
    batches = np.split(missing, range(batch_size, len(missing), batch_size)) if len(missing) else []
    with (
        tqdm(total=len(missing), desc=doing, unit=unit, disable=not progress or not len(missing)) as bar,
        ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads,
    ):
        ahead: deque[Iterator[T]] = deque()
        rest = iter(batches)
        for batch in batches:
            for coming in itertools.islice(rest, 2 - len(ahead)):
                ahead.append(threads.map(load, coming.tolist()))
            writer.append(keys[batch], encode(list(ahead.popleft())))
            bar.update(len(batch))
    writer.commit()


def needed(writer: Writer, keys: Keys) -> int:
    """Bytes on disk that filling in these keys will take, three versions of the index at once included."""
    new = len(writer.missing(keys))
    return new and new * writer.kind.record.itemsize + 3 * (len(writer.keys) + new) * (KEY.itemsize + NUMBER.itemsize)
