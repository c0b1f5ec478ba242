"""A metadata file with some rows changed, dropped or added, which takes the old one's place in a single step.

Rows that stay as they are keep their bytes in jsonl, their cells in csv and their types in parquet.
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from ldm.data.sources.tables import BadRow, json_row, open_csv
from ldm.system.files import write_in_place

#: A row => the row in its place, the same object where nothing changes; None drops it.
Change: TypeAlias = Callable[[dict[str, Any]], "dict[str, Any] | None"]


def rewrite_table(path: str, change: Change, added: Sequence[dict[str, Any]] = ()) -> int:
    """Change the rows of a metadata file that `read_table` reads.

    Args:
        path: csv, jsonl or parquet.
        change: called with each readable row; rows that can't be read stay as they are.
        added: rows that follow; their columns are added where the file lacks them.
    Returns:
        The number of its rows afterwards.
    """
    if path.endswith(".parquet"):
        return _parquet(path, change, added)
    with open(path, "rb") as file:
        data = file.read()
    written, rows = (_csv if path.endswith(".csv") else _jsonl)(data, path, change, added)
    write_in_place(path, written)
    return rows


def _jsonl(data: bytes, path: str, change: Change, added: Sequence[dict[str, Any]]) -> tuple[bytes, int]:
    mark = b"\xef\xbb\xbf" if data.startswith(b"\xef\xbb\xbf") else b""
    lines = []
    for line in data.removeprefix(mark).split(b"\n"):
        row = json_row(line) if line.strip() else None
        new = change(row) if isinstance(row, dict) else row
        if isinstance(new, dict):
            lines.append(line if new is row else _json(new))
        elif isinstance(new, BadRow):
            lines.append(line)
    lines += map(_json, added)
    return mark + b"".join(line + b"\n" for line in lines), len(lines)


def _json(row: dict[str, Any]) -> bytes:
    return json.dumps(row, ensure_ascii=False).encode()


def _csv(data: bytes, path: str, change: Change, added: Sequence[dict[str, Any]]) -> tuple[bytes, int]:
    mark = b"\xef\xbb\xbf" if data.startswith(b"\xef\xbb\xbf") else b""
    reader, header, delimiter = open_csv(data.removeprefix(mark).decode(errors="surrogateescape"), path)
    rows: list[dict[str, Any] | list[str]] = []
    for cells in reader:
        if len(cells) != len(header):  # reported by whoever reads it
            rows += [cells] * bool(cells)
            continue
        new = change(dict(zip(header, cells, strict=True)))
        rows += [] if new is None else [new]
    rows += added
    columns = list(dict.fromkeys([*header, *(name for row in rows if isinstance(row, dict) for name in row)]))
    text = io.StringIO(newline="")
    writer = csv.writer(text, delimiter=delimiter, lineterminator="\r\n" if b"\r\n" in data else "\n")
    writer.writerow(columns)
    writer.writerows([row.get(name, "") for name in columns] if isinstance(row, dict) else row for row in rows)
    return mark + text.getvalue().encode(errors="surrogateescape"), len(rows)


def _parquet(path: str, change: Change, added: Sequence[dict[str, Any]]) -> int:
    import pyarrow
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as file:
        table = file.read()
    rows = [*(new for row in table.to_pylist() if (new := change(row)) is not None), *added]
    schema = table.schema
    for name in dict.fromkeys(name for row in rows for name in row if name not in schema.names):
        schema = schema.append(pyarrow.field(name, pyarrow.string()))
    lists = [field.name for field in schema if pyarrow.types.is_list(field.type)]
    rows = [{**row, **{name: [row[name]] for name in lists if isinstance(row.get(name), str)}} for row in rows]
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, schema), buffer)
    write_in_place(path, buffer.getvalue())
    return len(rows)


def file_of(folder: str, row: dict[str, Any]) -> str | None:
    """The normal path of a row's picture, for a metadata file in this folder; None where it names none."""
    name = row.get("file_name")
    return os.path.normpath(os.path.join(folder, name)) if isinstance(name, str) and name.strip() else None
