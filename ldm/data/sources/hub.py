"""Captioned pictures of a Hugging Face data set: from the Hub by name, or saved on disk by `datasets`.

Captions are read at once, and pictures one at a time, undecoded: `datasets` would let any format and any size through.
Rows are counted as `datasets` counts them, from 0, so that `row 17` is `dataset[17]`.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from ldm.data.images import BadPictureError
from ldm.data.rows import BadDataError, Finding, Found, Stamp, file_stamp, plain, require_columns


class HubStore:
    """The picture column of a data set, read by row."""

    def __init__(self, pictures: Any, column: str, folder: str | None) -> None:
        from datasets import config
        from huggingface_hub import constants

        self._pictures, self._column = pictures, column
        # A cell may hold the path of a picture instead of its bytes. Paths are not trusted: only what was
        # downloaded, or lies in the data set's own folder, is opened.
        caches = [config.HF_DATASETS_CACHE, constants.HF_HUB_CACHE, *([folder] if folder else [])]
        self._allowed = [os.path.realpath(cache) for cache in caches]
        self._stamp = _stamp(pictures, column)

    def read(self, locator: int) -> bytes:
        """The bytes of a picture. Raises BadPictureError if the row has none."""
        cell = self._pictures[locator][self._column] or {}
        if cell.get("bytes") is not None:
            return bytes(cell["bytes"])
        path = cell.get("path")
        if not path:
            raise BadPictureError("picture is missing")
        real = os.path.realpath(path)
        if not any(os.path.commonpath([real, folder]) == folder for folder in self._allowed):
            raise BadPictureError(f"picture is a path that leads out of the data set ({path[:200]})")
        try:
            with open(real, "rb") as file:
                return file.read()
        except OSError as error:
            raise BadPictureError(f"picture cannot be read ({error.strerror})") from None

    def stamp(self, locator: int) -> Stamp | None:
        """What changes when the data set's files do; None if its pictures lie elsewhere, or in memory."""
        return None if self._stamp is None else (f"{self._stamp[0]} {locator}", self._stamp[1])


def _stamp(pictures: Any, column: str) -> Stamp | None:
    """That of all files of a data set."""
    files = [file_stamp(os.path.realpath(file["filename"])) for file in pictures.cache_files]
    chunks = pictures.data.column(column).chunks
    if not files or any(chunk.field("bytes").null_count for chunk in chunks):
        return None
    texts = "\0".join([pictures._fingerprint, *(text for text, _ in files)])
    return hashlib.blake2b(texts.encode(), digest_size=16).hexdigest(), max(changed for _, changed in files)


def load(source: str, config: str | None, split: str) -> Any:
    """A map-style `datasets.Dataset`. Prints to stderr what it downloads, before it does.

    Raises:
        BadDataError: if there is no such data set, configuration or split, or the Hub cannot be reached.
    """
    import datasets

    try:
        if os.path.isdir(source) and is_saved(source):
            dataset = datasets.load_from_disk(source)
        else:
            if not os.path.isdir(source):
                cache = datasets.config.HF_DATASETS_CACHE
                print(
                    f"{source} is no folder here: reading the data set {source!r} of the Hugging Face Hub; "
                    f"what {cache} does not hold yet is downloaded now",
                    file=sys.stderr,
                    flush=True,
                )
            dataset = datasets.load_dataset(source, config)
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise BadDataError(f"neither a folder nor a data set that can be read: {source} ({reason})") from None
    if isinstance(dataset, datasets.DatasetDict):
        if split not in dataset:
            splits = ", ".join(dataset)
            raise BadDataError(f"data set has no split {split!r}: {source} has {splits}; set data.hub_split")
        dataset = dataset[split]
    return dataset


def hub_rows(dataset: Any, name: str, caption_columns: Sequence[str]) -> Iterator[Finding]:
    """A row for each row of the data set. Cells of a ClassLabel column are the names of the classes."""
    from datasets import ClassLabel, Value

    names = {key: kind.names for key, kind in dataset.features.items() if isinstance(kind, ClassLabel)}
    values = {key for key, kind in dataset.features.items() if isinstance(kind, Value) and "binary" not in kind.dtype}
    wanted = [key for key in dataset.column_names if key in values or key in names or key in caption_columns]
    if not wanted:
        yield from (Found(f"{name} row {number}", number, ()) for number in range(len(dataset)))
        return
    number = 0
    for batch in dataset.with_format(None).select_columns(wanted).iter(1000):
        for cells in zip(*batch.values(), strict=True):
            row = dict(zip(batch, cells, strict=True))
            for column, classes in names.items():  # of which -1 and None are no class
                row[column] = None if row[column] in (None, -1) else classes[row[column]]
            captions = [row[column] for column in caption_columns]
            extra = plain(row, ("split", *caption_columns))
            yield Found(f"{name} row {number}", number, captions, row.get("split"), extra)
            number += 1


def open_store(dataset: Any, source: str, image_column: str, caption_columns: Sequence[str]) -> HubStore:
    """The store of a data set's pictures. Raises BadDataError if a column is missing or holds no pictures."""
    from datasets import Image, Value

    columns = set(dataset.column_names)
    require_columns([image_column], columns, source, "set data.image_column")
    require_columns(caption_columns, columns - {image_column, "split"}, source, "set data.caption_columns")
    kind = dataset.features[image_column]
    if isinstance(kind, Value) and "string" in kind.dtype:
        raise BadDataError(
            f"column {image_column!r} holds text, not pictures: {source}; "
            "download what it names first (img2dataset makes shards), or set data.image_column"
        )
    try:
        pictures = dataset.with_format(None).select_columns([image_column])
        pictures = pictures.cast_column(image_column, Image(decode=False))
    except (TypeError, ValueError, NotImplementedError) as error:
        raise BadDataError(f"column {image_column!r} holds no pictures ({str(error)[:80]}): {source}") from None
    return HubStore(pictures, image_column, source if os.path.isdir(source) else None)


def is_saved(folder: str) -> bool:
    return any(os.path.exists(os.path.join(folder, name)) for name in ("state.json", "dataset_dict.json"))
