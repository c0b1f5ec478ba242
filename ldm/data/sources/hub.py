"""Captioned pictures of a Hugging Face data set: from the Hub by name, or saved on disk by `datasets`.

Captions are read at once, and pictures one at a time, undecoded: `datasets` would let any format and any size through.
Rows are counted as `datasets` counts them, from 0, so that `row 17` is `dataset[17]`. Every other column of pictures
holds second pictures, which are read by row and column.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ldm.data.images import BadPictureError
from ldm.data.rows import BadDataError, Finding, Found, Stamp, file_stamp, plain, require_columns


class HubStore:
    """The pictures of a data set, read by row, those of other columns by (row, column)."""

    def __init__(self, pictures: Any, column: str, folder: str | None, others: Mapping[str, Any] | None = None) -> None:
        """Read the pictures of one column, and those of others by their data sets of one column."""
        from datasets import config
        from huggingface_hub import constants

        self._column, self._pictures = column, {column: pictures, **(others or {})}
        # A cell may hold the path of a picture instead of its bytes. Paths are not trusted: only what was
        # downloaded, or lies in the data set's own folder, is opened.
        caches = [config.HF_DATASETS_CACHE, constants.HF_HUB_CACHE, *([folder] if folder else [])]
        self._allowed = [os.path.realpath(cache) for cache in caches]
        self._stamps = {name: _stamp(of_column, name) for name, of_column in self._pictures.items()}

    def read(self, locator: int | Sequence[Any]) -> bytes:
        """The bytes of a picture. Raises BadPictureError if the row has none."""
        row, column = self._place(locator)
        cell = self._pictures[column][row][column] or {}
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

    def locate(self, cell: object) -> tuple[int, str]:
        """The place of a second picture, by the row's cell for it. Raises BadPictureError if it names none."""
        if isinstance(cell, list | tuple) and len(cell) == 2 and cell[1] in self._pictures:
            return cell[0], cell[1]
        raise BadPictureError("column holds no pictures")

    def stamp(self, locator: int | Sequence[Any]) -> Stamp | None:
        """What changes when the data set's files do; None if its pictures lie elsewhere, or in memory."""
        row, column = self._place(locator)
        stamp = self._stamps[column]
        return (
            None if stamp is None else (f"{stamp[0]} {row}{'' if column == self._column else ' ' + column}", stamp[1])
        )

    def _place(self, locator: int | Sequence[Any]) -> tuple[int, str]:
        return (locator, self._column) if isinstance(locator, int) else (locator[0], locator[1])


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


def hub_rows(dataset: Any, name: str, caption_columns: Sequence[str], image_column: str = "image") -> Iterator[Finding]:
    """A row for each row of the data set. Cells of a ClassLabel column are the names of the classes."""
    from datasets import ClassLabel, Value

    seconds = second_columns(dataset, image_column)

    names = {key: kind.names for key, kind in dataset.features.items() if isinstance(kind, ClassLabel)}
    values = {key for key, kind in dataset.features.items() if isinstance(kind, Value) and "binary" not in kind.dtype}
    wanted = [key for key in dataset.column_names if key in values or key in names or key in caption_columns]
    if not wanted:
        for number in range(len(dataset)):
            yield Found(f"{name} row {number}", number, (), extra={column: (number, column) for column in seconds})
        return
    number = 0
    for batch in dataset.with_format(None).select_columns(wanted).iter(1000):
        for cells in zip(*batch.values(), strict=True):
            row = dict(zip(batch, cells, strict=True))
            for column, classes in names.items():  # of which -1 and None are no class
                row[column] = None if row[column] in (None, -1) else classes[row[column]]
            captions = [row[column] for column in caption_columns]
            extra = plain(row, ("split", *caption_columns)) | {column: (number, column) for column in seconds}
            yield Found(f"{name} row {number}", number, captions, row.get("split"), extra)
            number += 1


def open_store(dataset: Any, source: str, image_column: str, caption_columns: Sequence[str]) -> HubStore:
    """The store of a data set's pictures. Raises BadDataError if a column is missing or holds no pictures."""
    from datasets import Value

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
        pictures = _undecoded(dataset, image_column)
    except (TypeError, ValueError, NotImplementedError) as error:
        raise BadDataError(f"column {image_column!r} holds no pictures ({str(error)[:80]}): {source}") from None
    others = {column: _undecoded(dataset, column) for column in second_columns(dataset, image_column)}
    return HubStore(pictures, image_column, source if os.path.isdir(source) else None, others)


def second_columns(dataset: Any, image_column: str) -> list[str]:
    """The other columns that hold pictures."""
    from datasets import Image

    return [name for name, kind in dataset.features.items() if isinstance(kind, Image) and name != image_column]


def _undecoded(dataset: Any, column: str) -> Any:
    """The data set of a column of pictures alone, as the bytes of their files."""
    from datasets import Image

    return dataset.with_format(None).select_columns([column]).cast_column(column, Image(decode=False))


def is_saved(folder: str) -> bool:
    return any(os.path.exists(os.path.join(folder, name)) for name in ("state.json", "dataset_dict.json"))
