"""What each picture holds, in 16 bytes, without reading those that have been read before.

A picture's content is known by a hash of its bytes. Reading them all at every start would take as long as copying the
data set, so the hash is stored under the picture's stamp (a file's name, inode, size and times of change), and a
picture whose stamp is known isn't read again. One that changed within the last seconds is: a file system's clock may
be too coarse to tell two changes of one moment apart (git's "racy" files).
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence

import numpy as np
from tqdm import tqdm

from ldm.data.cache.records import DamagedError, Keys, Kind, Records, to_keys
from ldm.data.cache.writer import Writer
from ldm.data.dataset import Row

SETTLED = 2.0  # seconds; the coarsest clock of a file system in use, FAT's
CONTENTS = Kind("contents", {"of": "stamps"}, "u1", (16,))


def hash_content(data: bytes) -> bytes:
    """16 bytes that differ between any two contents."""
    return hashlib.blake2b(data, digest_size=16).digest()


def contents(pictures: Sequence[Row], writer: Writer, progress: bool = True) -> Keys:
    """The hash of each picture's bytes [N].

    Args:
        writer: of a store of CONTENTS; the hashes of pictures that were read are added to it.
    Raises:
        BadDataError: if a picture is gone, naming the row.
    """
    known = writer.reader()
    rows = tqdm(range(len(pictures)), "looking for changes", unit="picture", disable=not progress, delay=2, leave=False)
    found, new_keys, new_hashes = bytearray(), bytearray(), bytearray()
    for i in rows:
        row = pictures[i]
        stamp = row.stamp()  # before reading: if the file changes in between, the old stamp is never seen again
        key = b"" if stamp is None else CONTENTS.key(stamp[0].encode())
        content = _known(known, key)
        if content is None:
            now = time.time()
            content = hash_content(row.read())
            if stamp is not None and now - stamp[1] >= SETTLED:
                new_keys += key
                new_hashes += content
        found += content
        writer.tick()
    keys = to_keys(bytes(new_keys))
    places = writer.missing(keys)  # rows may share a file
    writer.append(keys[places], np.frombuffer(bytes(new_hashes), np.uint8).reshape(-1, 16)[places])
    writer.commit()
    return to_keys(found)


def _known(store: Records, key: bytes) -> bytes | None:
    """The hash stored under a stamp's key, None if there is none."""
    number = int(store.find(to_keys(key))[0]) if key else -1
    try:
        return None if number < 0 else store.read(number).tobytes()
    except DamagedError:  # the store is marked now, and mended at the next start
        return None
