"""Arrays of one shape on disk, each found by what it was computed from.

    <store>/
        records.raw      records one after the other: key (16 bytes), payload, CRC-32 of both
        index-<n>.raw    of the first n records: the keys, sorted, then the number of each one's record
        manifest.json    what the store holds, how much of it is committed, sums

Opening reads the manifest and compares two file sizes, whatever the number of records. A lookup is a binary search in
the mapped index; a read copies one record and checks its sum. Neither costs memory.

What is noticed: on opening, a manifest that is missing, damaged or of another store, and files that are too short; on
opening to write (filling.py), a flipped bit anywhere in the index; on reading, a flipped bit in that record (CRC-32).
A damaged record nobody has read is found by `damaged`, which reads everything. Nothing is used that failed a check.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import mmap
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

FORMAT = 1  # of these files
KEY = np.dtype("S16")  # compares bytes like memcmp; an element read from an array loses trailing zeros, a slice doesn't
NUMBER = np.dtype("<i8")
RECORDS, MANIFEST, DAMAGED = "records.raw", "manifest.json", "damaged"

Keys = npt.NDArray[np.bytes_]
Numbers = npt.NDArray[np.int64]


class DamagedError(OSError):
    """A store, or a record of it, that is not what was written."""


@dataclass(frozen=True)
class Kind:
    """What a store holds.

    Attributes:
        name: of the folder, before a digest of `what`.
        what: everything that payloads depend on besides their keys, as JSON holds it; another `what` is another store.
        dtype, shape: of a payload.
    """

    name: str
    what: dict[str, Any]
    dtype: str
    shape: tuple[int, ...]

    @classmethod
    def of(cls, folder: Path) -> Kind:
        """The kind that a store's manifest names. Raises DamagedError."""
        try:
            plain = json.loads((folder / MANIFEST).read_text("utf-8"))
            return cls(plain["kind"], plain["what"], plain["dtype"], tuple(plain["shape"]))
        except (OSError, ValueError, KeyError, TypeError):
            raise DamagedError(f"{MANIFEST} is missing or damaged") from None

    @cached_property
    def digest(self) -> bytes:
        """16 bytes that differ between any two kinds."""
        told = json.dumps([FORMAT, self.name, self.what, self.dtype, self.shape], sort_keys=True)
        return hashlib.blake2b(told.encode(), digest_size=16).digest()

    @cached_property
    def seed(self) -> int:
        """What sums start from, so that another kind's record isn't whole here."""
        return zlib.crc32(self.digest)

    @property
    def folder(self) -> str:
        """The store's name beside others."""
        return f"{self.name}-{self.digest.hex()[:16]}"

    @cached_property
    def record(self) -> np.dtype[Any]:
        """A record's layout."""
        return np.dtype([("key", "V16"), ("payload", self.dtype, self.shape), ("sum", "<u4")])

    def key(self, *parts: bytes) -> bytes:
        """16 bytes for what a payload is computed from; no other kind makes the same, so no foreign record is found."""
        digest = hashlib.blake2b(digest_size=16, key=self.digest)
        for part in parts:
            digest.update(len(part).to_bytes(8, "little") + part)
        return digest.digest()

    def pack(self, keys: Keys, payloads: npt.NDArray[Any]) -> bytes:
        """Keys [N] and payloads [N, *shape] => N records."""
        records = np.zeros(len(keys), self.record)
        records["key"] = keys.view("V16")
        records["payload"] = payloads
        for i in range(len(records)):
            records["sum"][i] = zlib.crc32(records[i : i + 1].tobytes()[:-4], self.seed)
        return records.tobytes()

    def whole(self, record: memoryview | bytes) -> bool:
        """Whether a record's bytes have the sum that was written with them."""
        return zlib.crc32(record[:-4], self.seed) == int.from_bytes(record[-4:], "little")


def to_keys(keys: bytes | bytearray) -> Keys:
    """Keys one after the other => an array of them [N]."""
    return np.frombuffer(keys, KEY)


def locate(keys: Keys, numbers: Numbers, wanted: Keys) -> Numbers:
    """The numbers at `wanted` among sorted keys; -1 for those that aren't there."""
    if not len(keys):
        return np.full(len(wanted), -1, np.int64)
    place = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[place] == wanted, numbers[place], -1).astype(np.int64)


@dataclass(frozen=True)
class Manifest:
    """What is committed: `records` slots of records.raw, of which the index names `indexed`."""

    records: int
    indexed: int
    index_sum: str

    @property
    def index(self) -> str:
        """The index file's name."""
        return f"index-{self.records}-{self.indexed}.raw"

    def to_json(self, kind: Kind) -> str:
        plain = {"kind": kind.name, "what": kind.what, "dtype": kind.dtype, "shape": kind.shape}
        plain |= {"store": kind.digest.hex(), **self.__dict__}
        return json.dumps({**plain, "sum": _sum(plain)}, indent=2) + "\n"

    @classmethod
    def read(cls, folder: Path, kind: Kind) -> Manifest:
        """The manifest of a store of this kind whose files are as long as it says. Raises DamagedError."""
        try:
            plain = json.loads((folder / MANIFEST).read_text("utf-8"))
            if plain.pop("sum") != _sum(plain):
                raise ValueError
            manifest = cls(plain["records"], plain["indexed"], plain["index_sum"])
        except FileNotFoundError:
            raise DamagedError(f"{MANIFEST} is missing") from None
        except (ValueError, KeyError, AttributeError, TypeError):
            raise DamagedError(f"{MANIFEST} is damaged") from None
        if plain["store"] != kind.digest.hex():
            raise DamagedError(f"{MANIFEST} is that of another store")
        sizes = {
            RECORDS: manifest.records * kind.record.itemsize,
            manifest.index: manifest.indexed * (KEY.itemsize + NUMBER.itemsize),
        }
        for name, size in sizes.items():
            there = (folder / name).stat().st_size if (folder / name).exists() else -1
            if there < size or (there > size and name != RECORDS):  # records beyond the last commit don't count
                raise DamagedError(f"{name} is missing" if there < 0 else f"{name} has {there} bytes, not {size}")
        if (folder / DAMAGED).exists():
            raise DamagedError((folder / DAMAGED).read_text("utf-8"))
        return manifest


def _sum(plain: dict[str, Any]) -> str:
    return hashlib.blake2b(json.dumps(plain, sort_keys=True).encode(), digest_size=16).hexdigest()


def sum_of(path: Path) -> str:
    """The checksum of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


class Records:
    """A store, open for reading.

    Raises:
        DamagedError: if the folder holds no whole store of this kind.
    """

    def __init__(self, folder: Path, kind: Kind) -> None:
        self.folder, self.kind = folder, kind
        self.manifest = Manifest.read(folder, kind)
        count = self.manifest.indexed
        self._records = (folder / RECORDS).open("rb", buffering=0)
        index = _map(folder / self.manifest.index, count * (KEY.itemsize + NUMBER.itemsize))
        self.keys: Keys = np.frombuffer(index, KEY, count)
        self.numbers: Numbers = np.frombuffer(index, NUMBER, count, count * KEY.itemsize)

    def __len__(self) -> int:
        return self.manifest.indexed

    def __reduce__(self) -> tuple[Any, ...]:
        return Records, (self.folder, self.kind)  # a worker maps the files itself

    def find(self, keys: Keys) -> Numbers:
        """The record numbers of these keys [N]; -1 where there is none."""
        return locate(self.keys, self.numbers, keys)

    def read(self, number: int) -> npt.NDArray[Any]:
        """A copy of the payload of a record.

        Raises:
            DamagedError: if its sum is wrong; the store is then marked, and mended by whoever opens it to write.
            IndexError: if there is no such record.
        """
        if not 0 <= number < self.manifest.records:
            raise IndexError(f"record {number} of {self.manifest.records}: {self.folder}")
        size = self.kind.record.itemsize
        record = bytearray(size)
        # not mapped: with every page that is touched Linux maps its neighbors, and a process grows by what it has seen
        read = os.preadv(self._records.fileno(), [record], number * size)
        if read < size or not self.kind.whole(memoryview(record)):
            with contextlib.suppress(OSError):  # a store that is only lent
                (self.folder / DAMAGED).write_text(f"record {number} is damaged", "utf-8")
            raise DamagedError(
                f"record {number} is damaged: {self.folder / RECORDS}; give the same command again: it encodes anew "
                "what is damaged, and goes on. If it happens often, the disk is failing"
            )
        payload: npt.NDArray[Any] = np.frombuffer(record, self.kind.record)["payload"][0]
        return payload

    def damaged(self, progress: bool = False) -> Iterator[int]:
        """The numbers of the records whose sums are wrong; reads everything."""
        for number in tqdm(np.sort(self.numbers), f"checking {self.kind.name}", unit="record", disable=not progress):
            try:
                self.read(int(number))
            except DamagedError:
                yield int(number)


def _map(path: Path, size: int) -> mmap.mmap | bytes:
    if not size:
        return b""  # nothing can't be mapped
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ)
    if hasattr(mmap, "MADV_RANDOM"):
        mapped.madvise(mmap.MADV_RANDOM)
    return mapped
