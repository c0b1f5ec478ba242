"""Metadata files => rows: csv, jsonl and parquet, each row with its number.

A row that cannot be read becomes a `BadRow`, so that it is reported together with all others.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeAlias

from ldm.data.rows import BadDataError


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be read: the reason, and the file_name in it if it can be found."""

    what: str
    file_name: str | None = None


DELIMITERS = (",", ";", "\t", "|")  # of csv files, the likeliest first
Row: TypeAlias = "dict[str, object] | BadRow"


def read_table(path: str, columns: set[str]) -> Iterator[tuple[int, Row]]:
    """Yield (row number, row) of a metadata file; the columns met are added to `columns`.

    Raises:
        BadDataError: if the file as a whole is not what its name promises.
    """
    if path.endswith(".parquet"):
        return _parquet(path, columns)
    try:
        with open(path, "rb") as file:
            data = file.read().removeprefix(b"\xef\xbb\xbf")
    except OSError as error:
        raise BadDataError(f"metadata cannot be read ({error.strerror}): {path}") from None
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise BadDataError(f"metadata is UTF-16: {path}; save it as UTF-8")
    return _csv(data, path, columns) if path.endswith(".csv") else _jsonl(data, columns)


def _jsonl(data: bytes, columns: set[str]) -> Iterator[tuple[int, Row]]:
    for number, line in enumerate(data.split(b"\n"), 1):
        if not line.strip():
            continue
        row = json_row(line)
        if isinstance(row, dict):
            columns.update(row)
        yield number, row


class _RepeatedKey(ValueError):
    pass


def _unique(items: list[tuple[str, object]]) -> dict[str, object]:
    result = dict(items)
    if len(result) < len(items):
        names = [name for name, _ in items]
        raise _RepeatedKey(f"key {next(name for name in names if names.count(name) > 1)!r} appears twice")
    return result


_DECODER = json.JSONDecoder(object_pairs_hook=_unique)


def json_row(line: bytes) -> Row:
    """A JSON object, in UTF-8, that has no key twice; anything else is a BadRow."""
    try:
        row = _DECODER.decode(line.decode())
    except UnicodeDecodeError:
        what = "row is not UTF-8"
    except _RepeatedKey as error:
        what = str(error)
    except (ValueError, RecursionError) as error:
        what = f"row is not JSON ({str(error)[:80]})"
    else:
        return row if isinstance(row, dict) else BadRow(f"row is not a JSON object but {type(row).__name__}")
    found = re.search(rb'"file_name"\s*:\s*"([^"\\]+)"', line)
    return BadRow(what, found.group(1).decode(errors="replace") if found else None)


def _csv(data: bytes, path: str, columns: set[str]) -> Iterator[tuple[int, Row]]:
    # Bytes that are not UTF-8 become lone surrogates here, and a problem of their own row below.
    text = data.decode(errors="surrogateescape")
    reader, header, _ = open_csv(text, path)
    twice = [name for name in header if header.count(name) > 1]
    if twice:
        raise BadDataError(f"column {twice[0]!r} appears twice: {path} row 1")
    columns.update(header)
    number = 1
    while True:
        number += 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield number, BadRow(f"row is not csv ({error})")
            continue
        if cells:
            yield number, _csv_row(header, cells)


def open_csv(text: str, path: str) -> tuple[Iterator[list[str]], list[str], str]:
    """A reader of the rows behind the header, the header, and the delimiter.

    Cells are separated by commas, unless another delimiter finds the column that must be there or, if none does, more
    than one column.
    """
    found, first_error = [], None
    for delimiter in DELIMITERS:
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        try:
            found.append((reader, next(reader, []), delimiter))
        except csv.Error as error:
            first_error = first_error or error
    if not found:
        raise BadDataError(f"metadata is not csv ({first_error}): {path} row 1")
    return max(found, key=lambda each: ("file_name" in each[1], len(each[1]) > 1))


def _csv_row(header: list[str], cells: list[str]) -> Row:
    row: dict[str, object] = {name: cell or None for name, cell in zip(header, cells, strict=False)}
    name = row.get("file_name")
    known = name if isinstance(name, str) and name.isprintable() else None
    if len(cells) != len(header):
        return BadRow(f"row has {len(cells)} cells; the header has {len(header)}", known)
    if any("\ud800" <= character <= "\udfff" for cell in cells for character in cell):
        return BadRow("row is not UTF-8", known)
    return row


def _parquet(path: str, columns: set[str]) -> Iterator[tuple[int, Row]]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            columns.update(file.schema_arrow.names)
            number = 0
            for batch in file.iter_batches(1024):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except (pyarrow.ArrowException, OSError) as error:
        raise BadDataError(f"metadata is not parquet ({str(error)[:80]}): {path}") from None
