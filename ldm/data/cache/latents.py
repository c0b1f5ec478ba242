"""What never changes during training, computed once and kept on disk: posteriors of pictures, contexts of captions.

    <cache>/
        posteriors-….sqlite    picture => mean and std of its posterior; one file for each VAE, size and background
        contexts-….sqlite      caption => context; one file for each text encoder and max_length

Encoding costs as much as a training step and gives the same result every epoch. What changes from epoch to epoch is
not stored: latents are sampled from the stored posterior, mirrored pictures have a posterior of their own, and captions
are chosen and dropped when a sample is read.

Everything is found by the hash of what it was computed from, so a changed caption is one caption to encode, a new
picture is one picture, and runs can share a folder. Both are kept in float32, as the networks return them.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from tqdm import tqdm

from ldm.data.batches import PIXELS, load_pixels
from ldm.data.buckets import Buckets
from ldm.data.cache.store import Keys, Kind, Numbers, Store, to_keys
from ldm.data.cache.writer import Log, Tick, Writer
from ldm.data.dataset import Row
from ldm.data.facts import hash_content
from ldm.data.images import Size
from ldm.data.rows import count
from ldm.system.files import check_space, gib

#: pixels [B,3,H,W] => mean and std of the posterior, each [B,C,h,w].
EncodePixels = Callable[[Tensor], tuple[Tensor, Tensor]]
#: B captions => context [B,L,D].
EncodeCaptions = Callable[[list[str]], Tensor]

T = TypeVar("T")


def posterior_kind(vae: str, latent_shape: tuple[int, int, int], size: int | Size, background: str) -> Kind:
    """The store of posteriors [2,C,h,w] (mean, std) of center crops; `vae` is the fingerprint of its weights.

    Args:
        size: edge of squares, or width and height.
    """
    if not isinstance(size, int):
        size = size[0] if size[0] == size[1] else size
    what = {"vae": vae, "size": size, "crop": "center", "background": background, "pixels": PIXELS}
    return Kind("posteriors", what, "<f4", (2, *latent_shape))


def context_kind(text: str, context_shape: tuple[int, int]) -> Kind:
    """The store of contexts [L,D]; `text` is the fingerprint of the encoder's weights and its tokenizer."""
    return Kind("contexts", {"text": text}, "<f4", context_shape)


def picture_key(kind: Kind, content: bytes, flip: bool) -> bytes:
    """The key of a picture's posterior, by the hash of its bytes and whether it is mirrored."""
    return kind.key(content, b"mirrored" if flip else b"")


def caption_key(kind: Kind, caption: str) -> bytes:
    """The key of a caption's context."""
    return kind.key(caption.encode())


@dataclass(frozen=True)
class LatentCache:
    """The posteriors and contexts of some pictures, on disk.

    Attributes:
        posteriors, contexts: the stores, one for each bucket, and that of contexts; a model without text has none.
        buckets: of the pictures.
        table: [N,F] the key of each picture's posterior, and of its mirror image's where F is 2; a mapped file.
    """

    posteriors: Sequence[Store]
    contexts: Store | None
    buckets: Buckets
    table: npt.NDArray[np.void]

    @classmethod
    def open(
        cls, folder: Path, table: Path, posteriors: Sequence[Kind], contexts: Kind | None, buckets: Buckets
    ) -> LatentCache:
        """What `build` made. Raises DamagedError."""
        return cls(
            [Store(folder / kind.file, kind) for kind in posteriors],
            Store(folder / contexts.file, contexts) if contexts else None,
            buckets,
            np.load(table, mmap_mode="r"),
        )

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """Inside, a batch is read faster than one sample after the other."""
        with contextlib.ExitStack() as stores:
            for store in (*self.posteriors, *([self.contexts] if self.contexts else [])):
                stores.enter_context(store.reading())
            yield

    def posterior(self, row: int, flip: bool) -> tuple[Tensor, Tensor]:
        """Mean and std [C,h,w] of a picture. Raises DamagedError."""
        store = self.posteriors[self.buckets.of[row]]
        mean, std = torch.from_numpy(store.array(self.table[row, int(flip)].tobytes()))
        return mean, std

    def context(self, caption: str) -> Tensor:
        """The context [L,D] of a caption. Raises DamagedError, also for a caption that `build` was not given."""
        assert self.contexts is not None
        return torch.from_numpy(self.contexts.array(caption_key(self.contexts.kind, caption)))


@dataclass(frozen=True)
class Builder:
    """What a cache is made with.

    Attributes:
        folder: of the stores.
        progress: show bars.
        log: is given a line with what there is to encode, and what was damaged.
        tick: called at least once a batch or picture; others may be waiting.
    """

    folder: Path
    batch_size: int = 32
    progress: bool = True
    log: Log = print
    tick: Tick = lambda: None

    def writer(self, kind: Kind) -> Writer:
        """One of the stores, open for adding to it."""
        return Writer(self.folder / kind.file, kind, self.log, self.tick)

    def posteriors(
        self, writer: Writer, keys: Keys, pixels: Callable[[int], Tensor], encode: EncodePixels, unit: str = "picture"
    ) -> None:
        """Encode pictures that have no posterior yet: `pixels` gives those [3,H,W] of a number in `keys`."""

        def encode_batch(batch: list[Tensor]) -> Any:
            return torch.stack(encode(torch.stack(batch)), dim=1).float().cpu().numpy()

        self.fill(writer, keys, pixels, encode_batch, unit)

    def contexts(self, writer: Writer, keys: Keys, caption: Callable[[int], str], encode: EncodeCaptions) -> None:
        """Encode captions that have no context yet: `caption` gives that of a number in `keys`."""

        def encode_batch(batch: list[str]) -> Any:
            return encode(batch).float().cpu().numpy()

        self.fill(writer, keys, caption, encode_batch, "caption")

    def fill(
        self,
        writer: Writer,
        keys: Keys,
        load: Callable[[int], T],
        encode: Callable[[list[T]], npt.NDArray[Any]],
        unit: str,
    ) -> None:
        """Compute the records that are missing, each once, in order and in batches.

        Args:
            keys: [N] of all the records that are wanted.
            load: number in `keys` => what to encode; called in threads, a batch ahead.
            encode: a batch of that => payloads [B, *shape].
        """
        missing = writer.missing(keys)
        batches = np.split(missing, range(self.batch_size, len(missing), self.batch_size)) if len(missing) else []
        silent = not self.progress or not len(missing)
        with (
            tqdm(total=len(missing), desc=f"encoding {unit}s", unit=unit, disable=silent) as bar,
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

    def build(
        self,
        pictures: Sequence[Row],
        table: Path,
        posteriors: tuple[Sequence[Kind], EncodePixels],
        contexts: tuple[Kind, EncodeCaptions] | None,
        *,
        buckets: Buckets,
        flip: bool,
    ) -> None:
        """Encode what is missing of these pictures and their captions, and write the table of their keys.

        Args:
            posteriors: the kind of each bucket of the pictures, and what encodes them.
        Raises:
            NoSpaceError: before anything is encoded, if it doesn't fit on the disk; states how much is missing.
            BadDataError: if a picture can't be read, naming the row.
        """
        self._report_old()
        flips = (False, True) if flip else (False,)
        kinds, encode_pixels = posteriors
        hashes = self.hashes(pictures)
        of_row = [kinds[bucket] for bucket in buckets.of.tolist()]
        keys = to_keys(b"".join(picture_key(kind, hashes[i], f) for i, kind in enumerate(of_row) for f in flips))
        places = [np.flatnonzero(np.repeat(buckets.of == bucket, len(flips))) for bucket in range(len(kinds))]

        def pixels(number: int) -> Tensor:
            row, mirrored = divmod(number, len(flips))
            return load_pixels(pictures[row], buckets.size(row), flip=bool(mirrored), content=hashes[row])

        with contextlib.ExitStack() as stores:
            writers = [stores.enter_context(self.writer(kind)) for kind in kinds]
            encoded = [(writer, keys[place]) for writer, place in zip(writers, places, strict=True)]
            missing = sum(len(writer.missing(wanted)) for writer, wanted in encoded)
            new = count(missing, "picture") + (" (mirrored ones included)" if flip else "")
            needs = {new: sum(writer.needed(wanted) for writer, wanted in encoded)}
            if contexts is not None:
                captions = Captions.of(pictures, contexts[0])
                text_writer = stores.enter_context(self.writer(contexts[0]))
                new = count(len(text_writer.missing(captions.keys)), "caption")
                needs[new] = text_writer.needed(captions.keys)
            if size_needed := sum(needs.values()):
                self.log(f"cache: {' and '.join(needs)} to encode into {self.folder} ({gib(size_needed)})")
            else:
                self.log(f"cache: all {count(len(pictures), 'picture')} and their captions are in {self.folder}")
            check_space(self.folder, needs)
            if contexts is not None:
                self.contexts(text_writer, captions.keys, captions.text, contexts[1])
            for (writer, wanted), place in zip(encoded, places, strict=True):
                self.posteriors(writer, wanted, lambda i: pixels(int(place[i])), encode_pixels)  # noqa: B023 (used at once)
            save_table(table, keys.reshape(-1, len(flips)))

    def hashes(self, pictures: Sequence[Row]) -> list[bytes]:
        """The hash of each picture's content; pictures that were not looked at yet are read."""
        hashes = []
        for row in tqdm(pictures, "hashing pictures", unit="picture", disable=not self.progress, delay=2, leave=False):
            hashes.append(row.content or hash_content(row.read()))
            self.tick()
        return hashes

    def _report_old(self) -> None:
        old = sorted(path.parent for path in self.folder.glob("*/records.raw"))
        if old:
            names = ", ".join(folder.name for folder in old)
            self.log(f"cache: {self.folder} has records of an older version, which are not read; delete {names}")


@dataclass(frozen=True)
class Captions:
    """All captions of some pictures, as keys; the first is the null caption's. Their texts stay where they are."""

    pictures: Sequence[Row]
    keys: Keys
    ends: Numbers  # of each picture's captions among the keys

    @classmethod
    def of(cls, pictures: Sequence[Row], kind: Kind) -> Captions:
        keys, ends = bytearray(caption_key(kind, "")), []
        for row in pictures:
            for caption in row.captions:
                keys += caption_key(kind, caption)
            ends.append(len(keys) // 16)
        return cls(pictures, to_keys(bytes(keys)), np.array(ends, np.int64))

    def text(self, number: int) -> str:
        """The caption of a number in `keys`."""
        if number == 0:
            return ""
        row = int(np.searchsorted(self.ends, number, side="right"))
        captions = self.pictures[row].captions
        return captions[number - int(self.ends[row]) + len(captions)]


def save_table(path: Path, keys: Keys) -> None:
    """Write a table of keys [N,F], whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.new")
    with new.open("wb") as file:
        np.save(file, np.ascontiguousarray(keys).view("V16"))
    new.rename(path)
