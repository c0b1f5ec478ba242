"""Records on disk, each found by the 16-byte key of what it was computed from; one SQLite database a kind of record.

SQLite (https://sqlite.org/fileformat2.html) makes each commit whole or absent, however the process or the machine dies,
and lets one process write while others read. It does not notice a flipped bit in a payload, so each record has a CRC-32
of kind, key and payload, which every read compares. A store that was found damaged is marked; the next `Writer`
repairs it.

A rollback journal is used, not a write-ahead log, which file systems shared by several machines can't hold.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sqlite3
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from ldm.system.errors import NoSpaceError
from ldm.system.files import no_space

FORMAT = 2  # of the database
SUFFIX = ".sqlite"
PATIENCE = 60.0  # seconds to wait while another process commits
KEY = np.dtype("S16")  # compares bytes like memcmp; an element read from an array loses trailing zeros, a slice doesn't
AT_ONCE = 500  # keys in one query

Keys = npt.NDArray[np.bytes_]
Numbers = npt.NDArray[np.int64]

INSERT = "insert or replace into records values (?, ?, ?)"
SQLITE_ERRORS = (sqlite3.Error, UnicodeDecodeError)  # the message of an error may quote damaged bytes
# Errors of the system or of another process. All others mean that the file isn't what was written.
_NOT_DAMAGE = ("SQLITE_BUSY", "SQLITE_LOCKED", "SQLITE_READONLY", "SQLITE_CANTOPEN", "SQLITE_IOERR", "SQLITE_PERM",
               "SQLITE_AUTH", "SQLITE_NOMEM", "SQLITE_INTERRUPT", "SQLITE_PROTOCOL", "SQLITE_TOOBIG")  # fmt: skip


class DamagedError(OSError):
    """A store, or a record of it, that is not what was written."""


def damage(path: Path, what: str) -> DamagedError:
    """The error to raise; the store is marked, so that the next writer repairs it."""
    with contextlib.suppress(OSError):  # a store in a folder that can't be written
        marker(path).write_text(what, "utf-8")
    return DamagedError(
        f"{path.name}: {what}; run the same command again: it encodes what is damaged or missing, and continues. If it "
        f"happens often, the disk of {path.parent} is failing"
    )


@dataclass(frozen=True)
class Kind:
    """What a store holds.

    Attributes:
        name: of the file, before a digest of `what`.
        what: everything that payloads depend on besides their keys, as JSON holds it; another `what` is another store.
        dtype, shape: of a payload, where payloads are arrays.
    """

    name: str
    what: dict[str, Any]
    dtype: str = "u1"
    shape: tuple[int, ...] = ()

    @classmethod
    def of(cls, path: Path) -> Kind:
        """The kind of records in a database. Raises DamagedError."""
        with errors(path), contextlib.closing(connect(path)) as connection:
            (description,) = connection.execute("select description from kind").fetchone() or (b"",)
        try:
            _, name, what, dtype, shape = json.loads(description)
            return cls(name, what, dtype, tuple(shape))
        except (ValueError, TypeError):  # UnicodeDecodeError is a ValueError
            raise damage(path, "its kind can't be read") from None

    @cached_property
    def description(self) -> str:
        """The kind as JSON."""
        return json.dumps([FORMAT, self.name, self.what, self.dtype, self.shape], sort_keys=True)

    @cached_property
    def digest(self) -> bytes:
        """16 bytes that differ between any two kinds."""
        return hashlib.blake2b(self.description.encode(), digest_size=16).digest()

    @property
    def file(self) -> str:
        """The database's name beside others."""
        return f"{self.name}-{self.digest.hex()[:16]}{SUFFIX}"

    @property
    def size(self) -> int:
        """Bytes of a payload."""
        return np.dtype(self.dtype).itemsize * int(np.prod(self.shape))

    @property
    def disk_size(self) -> int:
        """Bytes on disk of a record, its entry in the index included."""
        return record_size(self.size, page_size(self.size))

    def disk_bytes(self, records: int) -> int:
        """Bytes on disk of a store of so many records, with the first page and the roots of two tables and an index."""
        return records * self.disk_size + 4 * page_size(self.size)

    def key(self, *parts: bytes) -> bytes:
        """16 bytes for what a payload is computed from; no other kind makes the same, so no foreign record is found."""
        digest = hashlib.blake2b(digest_size=16, key=self.digest)
        for part in parts:
            digest.update(len(part).to_bytes(8, "little") + part)
        return digest.digest()


def to_keys(keys: bytes | bytearray) -> Keys:
    """Keys one after the other => an array of them [N]."""
    return np.frombuffer(keys, KEY)


class Store:
    """A store, open for reading by any number of processes and threads.

    Raises:
        DamagedError: if there is no whole database of this kind.
    """

    def __init__(self, path: Path, kind: Kind) -> None:
        self.path, self.kind = path, kind
        self._connections: dict[int, sqlite3.Connection] = {}  # by process: none may be used across a fork
        self._check()

    def _check(self) -> None:
        if not self.path.exists():
            raise DamagedError(f"{self.path.name}: file is missing")
        if marker(self.path).exists():
            raise damage(self.path, marker(self.path).read_text("utf-8"))
        self._check_kind()
        [(length,)] = self._query("select page_count * page_size from pragma_page_count, pragma_page_size")
        if self.path.stat().st_size < length:  # SQLite would read the rest as zeros
            raise damage(self.path, "database is truncated")

    def _check_kind(self) -> None:
        if self._query("select description from kind") != [(self.kind.description.encode(),)]:
            raise damage(self.path, "another kind of store")

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.path, self.kind)  # a worker connects itself

    def __len__(self) -> int:
        return int(self._query("select count(*) from records")[0][0])

    def _query(self, sql: str, parameters: Sequence[object] = ()) -> list[Any]:
        with errors(self.path):
            return self._connection().execute(sql, parameters).fetchall()

    def _connection(self) -> sqlite3.Connection:
        process = os.getpid()
        if process not in self._connections:
            self._connections[process] = connect(self.path)
        return self._connections[process]

    def _where(self, columns: str, keys: Sequence[bytes]) -> Iterator[Any]:
        for start in range(0, len(keys), AT_ONCE):
            some = keys[start : start + AT_ONCE]
            yield from self._query(f"select {columns} from records where key in ({','.join('?' * len(some))})", some)

    def missing(self, keys: Keys) -> Numbers:
        """Where in `keys` [N] those stand that have no record, each key once, in order."""
        first: Numbers = np.sort(np.unique(keys, return_index=True)[1])
        wanted = [keys[i : i + 1].tobytes() for i in first]
        found = {key for (key,) in self._where("key", wanted)}
        return first[[key not in found for key in wanted]] if wanted else first

    def get(self, keys: Sequence[bytes]) -> dict[bytes, bytes]:
        """The payloads of those keys that have an undamaged record."""
        rows = self._where("key, sum, payload", keys)
        return {key: payload for key, sum_, payload in rows if self.checksum(key, payload) == sum_}

    def read(self, key: bytes) -> bytes:
        """The payload of a record.

        Raises:
            DamagedError: if there is none, or its sum is wrong.
        """
        rows = self._query("select sum, payload from records where key = ?", (key,))
        if rows and rows[0][0] == self.checksum(key, rows[0][1]):
            payload: bytes = rows[0][1]
            return payload
        raise damage(self.path, f"a record is {'damaged' if rows else 'missing'}")

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """Inside, many reads take one lock, which is half of what a read of a small record costs; writers wait."""
        self._query("begin")
        try:
            yield
        finally:
            with contextlib.suppress(sqlite3.Error):  # an error may have ended it
                self._connection().execute("commit")

    def array(self, key: bytes) -> npt.NDArray[Any]:
        """The payload of a record as a new array of the kind's shape. Raises DamagedError."""
        return np.frombuffer(bytearray(self.read(key)), self.kind.dtype).reshape(self.kind.shape)

    def checksum(self, key: bytes, payload: bytes) -> int:
        """CRC-32 of a record, which isn't whole under another key or in another kind's store."""
        try:
            return zlib.crc32(payload, zlib.crc32(key, zlib.crc32(self.kind.digest)))
        except TypeError:  # damage can turn a payload into a number
            return -1

    def add(self, records: Iterable[tuple[bytes, bytes]]) -> None:
        """Commit keys with their payloads, all or none.

        Raises:
            NoSpaceError: if they don't fit on the disk.
        """
        rows = [(key, self.checksum(key, payload), payload) for key, payload in records]
        needs = {self.kind.name: sum(len(payload) for *_, payload in rows)}
        with errors(self.path, needs), transaction(self._connection()) as connection:
            connection.executemany(INSERT, rows)

    def damaged(self, progress: bool = False) -> Iterator[bytes]:
        """The keys of the records whose sums are wrong; reads everything."""
        keys = self.all_keys()
        for key in tqdm(keys, f"checking {self.kind.name}", len(self), unit="record", disable=not progress):
            if key not in self.get([key]):
                damage(self.path, "a record is damaged")
                yield key

    def all_keys(self) -> Iterator[bytes]:
        """The keys of all records."""
        with errors(self.path):
            for (key,) in self._connection().execute("select key from records"):
                yield key


def record_size(payload: int, page: int) -> int:
    """Bytes on disk of a record: its leaf and overflow pages (SQLite's file format, 1.6) and its entry in the index."""
    cell, most = payload + 32, page - 35
    least = (page - 12) * 32 // 255 - 23
    local = least + (cell - least) % (page - 4)
    local = cell if cell <= most else local if local <= most else least
    overflow = -(-(cell - local) // (page - 4))
    return overflow * page + page // ((page - 8) // (local + 16)) + 48


def page_size(payload: int) -> int:
    """The largest page, which reads fastest, that takes at most 5 % more of the disk than the thriftiest."""
    if payload < 1024:  # what a page of the index holds counts, which a commit writes
        return 4096
    pages = [4096 << i for i in range(5)]
    thrifty = min(record_size(payload, page) for page in pages)
    return max(page for page in pages if record_size(payload, page) <= 1.05 * thrifty)


def connect(path: Path, mode: str = "rw") -> sqlite3.Connection:
    """A connection to a database, of which any thread may make use."""
    name = f"file:{quote(os.fspath(path))}?mode={mode}"
    connection = sqlite3.connect(name, timeout=PATIENCE, isolation_level=None, check_same_thread=False, uri=True)
    connection.text_factory = bytes  # damage makes texts that are no UTF-8
    return connection


@contextlib.contextmanager
def transaction(connection: sqlite3.Connection) -> Iterator[sqlite3.Connection]:
    """Commits what is written inside, all or nothing."""
    connection.execute("begin immediate")
    try:
        yield connection
        connection.execute("commit")
    except BaseException:
        with contextlib.suppress(sqlite3.Error):  # it may have rolled back already
            connection.execute("rollback")
        raise


@contextlib.contextmanager
def errors(path: Path, needs: dict[str, int] | None = None) -> Iterator[None]:
    """SQLite's errors => NoSpaceError, DamagedError or another OSError; a damaged file is marked for repair."""
    try:
        yield
    except SQLITE_ERRORS as error:
        name = getattr(error, "sqlite_errorname", "")
        if name == "SQLITE_FULL":
            raise NoSpaceError(no_space(path.parent, needs or {})) from None
        if name.startswith(_NOT_DAMAGE):
            raise OSError(f"{path}: {error} ({name})") from None
        raise damage(path, f"database is damaged ({error})") from None


def marker(path: Path) -> Path:
    """The file beside a database that marks it as damaged, with the reason."""
    return path.with_suffix(".damaged")
