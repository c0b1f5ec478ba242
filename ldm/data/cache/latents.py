"""What never changes during training, computed once and kept on disk: posteriors of pictures, contexts of captions.

    <cache>/
        contents-…/      a file's stamp => the hash of its bytes (contents.py)
        posteriors-…/    picture => mean and std of its posterior; one folder for each VAE, size and background
        contexts-…/      caption => context; one folder for each text encoder and max_length

Encoding costs as much as a training step and gives the same answer every epoch. What does change from
epoch to epoch stays open: the latents are drawn anew from the stored posterior, mirrored pictures have a
posterior of their own, and captions are chosen and dropped when a sample is read.

Everything is found by the hash of what it was computed from, so a changed caption is one caption to encode, a new
picture is one picture, and runs can share a folder. Both are kept in float32, as the networks give them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldm.data.cache.records import Keys, Kind, Numbers, Records, to_keys
from ldm.data.cache.stamps import CONTENTS, contents, hash_content
from ldm.data.cache.writer import Say, Tick, Writer, fill, needed
from ldm.data.dataset import Row
from ldm.data.images import Crop, to_pixels, to_square
from ldm.data.rows import BadDataError, count
from ldm.system.files import check_space, gib

#: pixels [B,3,H,W] => mean and std of the posterior, each [B,C,h,w].
EncodePixels = Callable[[Tensor], tuple[Tensor, Tensor]]
#: B captions => context [B,L,D].
EncodeCaptions = Callable[[list[str]], Tensor]

PIXELS = 1  # the way from a file to pixels (pictures.py): raise it when that changes what a picture looks like


def load_pixels(
    row: Row,
    size: int,
    crop: Crop = "center",
    position: tuple[float, float] = (0.5, 0.5),
    flip: bool = False,
    content: bytes | None = None,
) -> Tensor:
    """A row's picture => pixels, float32 [3,size,size] in [-1,1].

    Raises:
        BadDataError: naming the row, if the picture can't be read, or its hash isn't `content`.
    """
    data = row.read()
    if content is not None and hash_content(data) != content:
        raise BadDataError(f"picture changed while it was being encoded; give the same command again: {row.where}")
    return torch.from_numpy(to_pixels(to_square(row.image(data), size, crop, position, flip)))


def choose_caption(captions: Sequence[str], u: float | None) -> str:
    """The caption that a uniform u in [0, 1) picks; None, a dropped caption, picks the null caption ""."""
    return "" if u is None else captions[int(u * len(captions))]


def posterior_kind(vae: str, latent_shape: tuple[int, int, int], size: int, background: str) -> Kind:
    """The store of posteriors [2,C,h,w] (mean, std) of center crops; `vae` is the fingerprint of its weights."""
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
        posteriors, contexts: the stores; a model that knows no text has no contexts.
        table: [N,F] the record of each picture's posterior, and of its mirror image's where F is 2; a mapped file.
    """

    posteriors: Records
    contexts: Records | None
    table: Numbers

    @classmethod
    def open(cls, folder: Path, table: Path, posteriors: Kind, contexts: Kind | None) -> LatentCache:
        """What `build` left. Raises DamagedError."""
        return cls(
            Records(folder / posteriors.folder, posteriors),
            Records(folder / contexts.folder, contexts) if contexts else None,
            np.load(table, mmap_mode="r"),
        )

    def posterior(self, row: int, flip: bool) -> tuple[Tensor, Tensor]:
        """Mean and std [C,h,w] of a picture. Raises DamagedError."""
        mean, std = torch.from_numpy(self.posteriors.read(int(self.table[row, int(flip)])))
        return mean, std

    def context(self, caption: str) -> Tensor:
        """The context [L,D] of a caption. Raises DamagedError; KeyError if it was not among those that were built."""
        assert self.contexts is not None
        number = int(self.contexts.find(to_keys(caption_key(self.contexts.kind, caption)))[0])
        if number < 0:
            raise KeyError(caption)
        return torch.from_numpy(self.contexts.read(number))


@dataclass(frozen=True)
class Builder:
    """What a cache is made with.

    Attributes:
        folder: of the stores.
        progress: show bars.
        say: told in a line what there is to do, and what was damaged.
        tick: called at least once a batch or picture; others may be waiting.
    """

    folder: Path
    batch_size: int = 32
    progress: bool = True
    say: Say = print
    tick: Tick = lambda: None

    def writer(self, kind: Kind) -> Writer:
        """One of the stores, open for adding to it."""
        return Writer(self.folder / kind.folder, kind, self.say, self.tick)

    def posteriors(
        self, writer: Writer, keys: Keys, pixels: Callable[[int], Tensor], encode: EncodePixels, unit: str = "picture"
    ) -> None:
        """Encode pictures that have no posterior yet: `pixels` gives those [3,H,W] of a number in `keys`."""

        def encode_batch(batch: list[Tensor]) -> Any:
            return torch.stack(encode(torch.stack(batch)), dim=1).float().cpu().numpy()

        fill(
            writer, keys, pixels, encode_batch, doing=f"encoding {unit}s", unit=unit, batch_size=self.batch_size,
            progress=self.progress,
        )  # fmt: skip

    def contexts(self, writer: Writer, keys: Keys, caption: Callable[[int], str], encode: EncodeCaptions) -> None:
        """Encode captions that have no context yet: `caption` gives that of a number in `keys`."""

        def encode_batch(batch: list[str]) -> Any:
            return encode(batch).float().cpu().numpy()

        fill(
            writer, keys, caption, encode_batch, doing="encoding captions", unit="caption", batch_size=self.batch_size,
            progress=self.progress,
        )  # fmt: skip

    def build(
        self,
        pictures: Sequence[Row],
        table: Path,
        posteriors: tuple[Kind, EncodePixels],
        contexts: tuple[Kind, EncodeCaptions] | None,
        *,
        size: int,
        flip: bool,
    ) -> None:
        """Encode what is missing of these pictures and their captions, and write the table of their records.

        Raises:
            NoSpaceError: before anything is encoded, if it doesn't fit on the disk; says how much is missing.
            BadDataError: if a picture can't be read, naming the row.
        """
        flips = (False, True) if flip else (False,)
        with self.writer(CONTENTS) as stamps:
            hashes = contents(pictures, stamps, self.progress)
        kind, encode_pixels = posteriors
        keys = to_keys(b"".join(picture_key(kind, bytes(h), f) for h in hashes.view("V16") for f in flips))

        def pixels(number: int) -> Tensor:
            row, mirrored = divmod(number, len(flips))
            content = hashes[row : row + 1].tobytes()
            return load_pixels(pictures[row], size, flip=bool(mirrored), content=content)

        with contextlib.ExitStack() as stores:
            pixel_writer = stores.enter_context(self.writer(kind))
            new = count(len(pixel_writer.missing(keys)), "picture") + (" (mirrored ones included)" if flip else "")
            needs = {new: needed(pixel_writer, keys)}
            if contexts is not None:
                captions = Captions.of(pictures, contexts[0])
                text_writer = stores.enter_context(self.writer(contexts[0]))
                new = count(len(text_writer.missing(captions.keys)), "caption")
                needs[new] = needed(text_writer, captions.keys)
            if size_needed := sum(needs.values()):
                self.say(f"cache: {' and '.join(needs)} to encode into {self.folder} ({gib(size_needed)})")
            else:
                self.say(f"cache: all {count(len(pictures), 'picture')} and their captions are in {self.folder}")
            check_space(self.folder, needs)
            if contexts is not None:
                self.contexts(text_writer, captions.keys, captions.text, contexts[1])
            self.posteriors(pixel_writer, keys, pixels, encode_pixels)
            save_table(table, pixel_writer.find(keys).reshape(-1, len(flips)))


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


def save_table(path: Path, numbers: Numbers) -> None:
    """Write a table of records [N,F] in one stroke."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.new")
    with new.open("wb") as file:
        np.save(file, numbers)
    new.rename(path)
