"""Building a store: one process at a time, in commits of a few seconds, after repairing what is damaged."""

from __future__ import annotations

import contextlib
import fcntl
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy.typing as npt
from tqdm import tqdm

from ldm.data.cache.store import (
    INSERT,
    SQLITE_ERRORS,
    DamagedError,
    Keys,
    Kind,
    Numbers,
    Store,
    connect,
    damage,
    errors,
    marker,
    page_size,
    transaction,
)
from ldm.system.files import sync

COMMIT_SECONDS, COMMIT_BYTES = 5.0, 32 << 20  # a killed process loses at most this much work
JOURNAL = 1 << 20  # bytes on disk while a commit is under way, with what a new database begins with
SMALLEST = 48  # bytes of a record and its entry in the index, at least

Log = Callable[[str], object]
Tick = Callable[[], None]

_SCHEMA = (
    "create table kind (description text not null)",
    "create table records (key blob primary key, sum integer not null, payload blob not null)",
)


class Writer(Store):
    """The only process that builds a store; use it in a `with`, which commits on leaving, errors included."""

    def __init__(self, path: Path, kind: Kind, log: Log = print, tick: Tick = lambda: None) -> None:
        """Name a store, which `__enter__` opens, repairs or makes.

        Args:
            log: is given a line if the store is damaged, or if another process is writing.
            tick: called every now and then while waiting or working.
        """
        self.path, self.kind, self._log, self.tick = path, kind, log, tick
        self._connections = {}
        self._new: list[tuple[bytes, bytes]] = []
        self._last_commit = time.monotonic()

    def __enter__(self) -> Writer:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = self.path.with_suffix(".lock").open("w")
        self._wait_for_lock()
        try:
            if not self.path.exists():
                self._make([])
            self._check()
        except DamagedError as error:
            self._repair(error)
        return self

    def __exit__(self, kind: object, *error: object) -> None:
        try:
            self.commit()
        except OSError:
            if kind is None:  # else what has happened already is the news
                raise
        finally:
            self._close()
            self._lock.close()

    def _wait_for_lock(self) -> None:
        waited = False
        while True:
            try:
                return fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if not waited:
                    self._log(f"cache: waiting for another process that is writing {self.path}")
                waited = True
                time.sleep(0.2)
                self.tick()

    def _close(self) -> None:
        for connection in self._connections.values():
            connection.close()
        self._connections.clear()

    def _make(self, records: Iterable[tuple[bytes, int, bytes]]) -> int:
        """Put a new database in place that holds these records; their number."""
        new, count = self.path.with_suffix(".new"), 0
        needs = {self.kind.name: self.path.stat().st_size if self.path.exists() else 0}
        for left in (new, journal(new)):
            left.unlink(missing_ok=True)
        with errors(new, needs=needs), contextlib.closing(connect(new, "rwc")) as connection:
            connection.execute(f"pragma page_size = {page_size(self.kind.size)}")
            with transaction(connection):
                for statement in _SCHEMA:
                    connection.execute(statement)
                connection.execute("insert into kind values (?)", (self.kind.description,))
                for record in records:
                    connection.execute(INSERT, record)
                    count += 1
        for old in (journal(self.path), marker(self.path)):  # the journal would be replayed into the new database
            old.unlink(missing_ok=True)
        new.replace(self.path)
        sync(self.path.parent)
        return count

    def missing(self, keys: Keys) -> Numbers:
        """As in a store; what can't be queried is repaired."""
        try:
            return super().missing(keys)
        except DamagedError as error:
            self._repair(error)
        return super().missing(keys)

    def _repair(self, error: DamagedError) -> None:
        """Remove the damaged records; of a database that can't be queried, move the others into a new one."""
        try:
            self._check_kind()
            for key in list(self.damaged()):
                self._query("delete from records where key = ?", (key,))
            if self._query("pragma integrity_check(1)") != [(b"ok",)]:
                raise damage(self.path, "database is damaged")
            kept = len(self)
            marker(self.path).unlink(missing_ok=True)
        except DamagedError:
            self._close()
            kept = self._make(self._whole())
        state = f"its {kept:,} undamaged records are kept" if kept else "it is made anew"
        self._log(f"cache: {self.path.parent}/{str(error).split(';')[0]}; {state}")

    def _whole(self) -> Iterator[tuple[bytes, int, bytes]]:
        """The records of a damaged database whose sums are right."""
        most = self.path.stat().st_size // max(SMALLEST, self.kind.size) if self.path.exists() else 0
        with contextlib.suppress(*SQLITE_ERRORS), contextlib.closing(connect(self.path, "ro&immutable=1")) as damaged:
            damaged.execute("pragma writable_schema = on")  # reads a file that has become shorter
            for number in tqdm(range(1, most + 1), "checking records", unit="record", leave=False, delay=2):
                with contextlib.suppress(*SQLITE_ERRORS):
                    for record in damaged.execute("select key, sum, payload from records where rowid = ?", (number,)):
                        if record[1] == self.checksum(record[0], record[2]):
                            yield record
                self.tick()

    def append(self, keys: Keys, payloads: npt.NDArray[Any]) -> None:
        """Add records, [N] and [N, *shape]; they are committed if the last commit is a while ago."""
        for i, payload in enumerate(payloads):
            self._new.append((keys[i : i + 1].tobytes(), payload.astype(self.kind.dtype, copy=False).tobytes()))
        late = time.monotonic() - self._last_commit > COMMIT_SECONDS
        if late or len(self._new) * self.kind.size > COMMIT_BYTES:
            self.commit()
        self.tick()

    def commit(self) -> None:
        """Make everything that was appended last."""
        if self._new:
            new, self._new = self._new, []
            self.add(new)
        self._last_commit = time.monotonic()

    def needed(self, keys: Keys) -> int:
        """Bytes on disk that the records of these keys will take which the store lacks."""
        new = len(self.missing(keys))
        return new and new * self.kind.disk_size + JOURNAL


def journal(path: Path) -> Path:
    """SQLite's rollback journal of a database: there while it is written, and after a kill."""
    return path.with_name(f"{path.name}-journal")
