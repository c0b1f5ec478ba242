"""WebDataset shards: tar files whose members share a key, `000123.jpg` with `000123.txt` or `000123.json`.

A second picture of the same key has a name before its ending, `000123.sketch.png`: that of its column, `sketch`.

The tars are read through once, headers and captions only, and the offset of each picture is kept; from then on any
picture is one seek away, so shards can be shuffled like a folder. A key is unique within its shard.
"""

from __future__ import annotations

import glob
import os
import re
import tarfile
from collections.abc import Iterator, Sequence

from ldm.data.images import BadPictureError
from ldm.data.rows import BadDataError, Finding, Found, Problem, Stamp, count, file_stamp, plain
from ldm.data.sources.folders import MAX_FILE_BYTES, MAX_TEXT_BYTES, PICTURES, caption_lines
from ldm.data.sources.tables import BadRow, json_row

_SEVERAL = re.compile(r"[*?\[{]")
_AMBIGUOUS = "several"  # pictures of one name and key, in place of the place of one


class ShardStore:
    """Pictures in tar files, read by (number of the shard, offset, size), in bytes."""

    def __init__(self, paths: Sequence[str]) -> None:
        self.paths = [os.path.realpath(path) for path in paths]

    def read(self, locator: Sequence[int]) -> bytes:
        """The bytes of a member. Raises BadPictureError if the shard has become shorter, or is gone."""
        shard, offset, size = locator
        try:
            with open(self.paths[shard], "rb") as file:
                file.seek(offset)
                data = file.read(size)
        except OSError as error:
            raise BadPictureError(f"shard cannot be read ({error.strerror})") from None
        if len(data) < size:
            raise BadPictureError("shard is truncated")
        return data

    def locate(self, cell: object) -> tuple[int, ...]:
        """The place of a second picture, by the row's cell for it. Raises BadPictureError if the key has none."""
        if isinstance(cell, list | tuple) and len(cell) == 3:
            return tuple(cell)
        raise BadPictureError(
            "key has several pictures of that name" if cell == _AMBIGUOUS else "key has no such picture"
        )

    def stamp(self, locator: Sequence[int]) -> Stamp:
        """What changes when the shard does. Raises BadPictureError if it is gone."""
        shard, offset, size = locator
        try:
            text, changed = file_stamp(self.paths[shard])
        except OSError as error:
            raise BadPictureError(f"shard cannot be read ({error.strerror})") from None
        return f"{text} {offset} {size}", changed


def is_pattern(source: str) -> bool:
    """Whether a source names tar files: `pictures.tar`, `shards/*.tar`, `shards/{000..003}.tar`."""
    return source.endswith((".tar", ".tar.gz", ".tgz")) or bool(_SEVERAL.search(source))


def find_shards(pattern: str) -> list[str]:
    """The tar files that a path, glob or brace pattern names. Raises BadDataError if one is missing."""
    paths: list[str] = []
    for name in _expand(pattern):
        found = sorted(glob.glob(name)) if glob.has_magic(name) and not os.path.exists(name) else [name]
        if not found:
            raise BadDataError(f"no shards match: {name}")
        paths += found
    missing = [path for path in paths if not os.path.isfile(path)]
    if missing:
        more = f" and {count(len(missing) - 1, 'other')}" if missing[1:] else ""
        raise BadDataError(f"shard is missing: {missing[0]}{more}; shards are read from this machine's disk")
    return paths


def shard_rows(paths: Sequence[str], caption_columns: Sequence[str], progress: bool) -> Iterator[Finding]:
    """A row for each picture of each shard."""
    from tqdm import tqdm

    for number, path in enumerate(tqdm(paths, "indexing shards", unit="shard", disable=not progress)):
        samples: dict[str, _Sample] = {}
        broken = _index(path, samples)
        if broken is not None:
            yield broken
        for key, sample in samples.items():
            yield sample.finding(number, f"{path} member {key}", caption_columns)
        if not samples and broken is None:
            yield Problem("shard has no pictures", path)


class _Sample:
    """The members of a shard that share a key."""

    def __init__(self) -> None:
        self.pictures: list[tuple[str, int, int]] = []  # suffix, offset, size
        self.seconds: dict[str, tuple[int, int] | None] = {}  # by name; None if there are several of it
        self.texts: dict[str, bytes] = {}
        self.problem: str | None = None

    def add(self, suffix: str, member: tarfile.TarInfo, tar: tarfile.TarFile) -> None:
        second, ending = os.path.splitext(suffix)
        if suffix not in (".txt", ".json") and ending not in PICTURES and suffix not in PICTURES:
            return
        limit = MAX_TEXT_BYTES if suffix in (".txt", ".json") else MAX_FILE_BYTES
        if not member.isreg() or member.issparse():
            self.problem = f"{suffix} is a link or special file; expected a plain one"
        elif member.size > limit:
            self.problem = f"{suffix} is too large ({member.size:,} bytes)"
        elif suffix in PICTURES:
            self.pictures.append((suffix, member.offset_data, member.size))
        elif ending in PICTURES and len(second) > 1:
            place = (member.offset_data, member.size)
            self.seconds[second[1:]] = None if second[1:] in self.seconds else place
        elif suffix in self.texts:
            self.problem = f"key has two {suffix}"
        elif (file := tar.extractfile(member)) is not None:
            self.texts[suffix] = file.read()

    def finding(self, shard: int, where: str, caption_columns: Sequence[str]) -> Finding:
        if self.problem is not None:
            return Problem(self.problem, where)
        if not self.pictures:
            return Problem("caption has no picture of the same key", where)
        if len(self.pictures) > 1:
            return Problem(f"key has several pictures ({', '.join(suffix for suffix, *_ in self.pictures)})", where)
        suffix, offset, size = self.pictures[0]
        where += suffix
        row = json_row(self.texts[".json"]) if ".json" in self.texts else {}
        if isinstance(row, BadRow):
            return Problem(f"caption's .json: {row.what}", where)
        cells: list[object] = [row[name] for name in caption_columns if name in row]
        if caption_columns and not cells and ".txt" in self.texts:
            lines = caption_lines(self.texts[".txt"], where)
            if isinstance(lines, Problem):
                return lines
            cells = list(lines)
        if caption_columns and not cells:
            columns = ", ".join(caption_columns)
            has = f"; its .json has {', '.join(row) or 'no keys'}, expected {columns}" if ".json" in self.texts else ""
            return Problem(f"picture has no caption of the same key{has}", where)
        extra = plain(row, ("split", *caption_columns))
        extra |= {name: (shard, *place) if place else _AMBIGUOUS for name, place in self.seconds.items()}
        return Found(where, (shard, offset, size), cells, row.get("split"), extra)


def _index(path: str, samples: dict[str, _Sample]) -> Problem | None:
    """Read a shard's headers and captions into `samples`; the Problem with the shard itself, if it has one."""
    name = ""
    try:
        length = os.path.getsize(path)
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if member.isdir():
                    continue
                name = member.name
                key, suffix = _key(name)
                if os.path.basename(key) and not os.path.basename(key).startswith("."):
                    samples.setdefault(key, _Sample())
                    if member.isreg() and member.offset_data + member.size > length:
                        del samples[key]  # the report on the shard covers this sample
                        return Problem("shard is truncated", f"{path} member {name}")
                    samples[key].add(suffix, member, tar)
            end = tar.offset
        # tarfile stops at a damaged header as if the archive ended there; a whole one ends with blocks of zeros.
        with open(path, "rb") as file:
            file.seek(end)
            block = file.read(tarfile.BLOCKSIZE)
        if len(block) < tarfile.BLOCKSIZE or any(block):
            what = "is broken" if block else "is truncated"
            return Problem(f"shard {what} (no end mark)", f"{path} after member {name}")
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:
        if samples:  # the last sample may be cut in two
            samples.popitem()
        hint = "; unpack .tar.gz first" if _is_gzip(path) else ""
        return Problem(f"shard is broken ({str(error)[:80]}{hint})", f"{path} after member {name}" if name else path)
    return None


def _key(name: str) -> tuple[str, str]:
    """`a/b.c.jpg` => (`a/b`, `.c.jpg`), as WebDataset cuts them."""
    folder, base = os.path.split(name)
    stem, dot, suffix = base.partition(".")
    return os.path.join(folder, stem), (dot + suffix).lower()


def _expand(pattern: str) -> list[str]:
    """`{000..002}` and `{a,b}` => every name, like a shell does."""
    found = re.search(r"\{([^{}]*)\}", pattern)
    if found is None:
        return [pattern]
    numbers = re.fullmatch(r"(\d+)\.\.(\d+)", found.group(1))
    if numbers:
        first, last = numbers.groups()
        choices = [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
    else:
        choices = found.group(1).split(",")
    head, tail = pattern[: found.start()], pattern[found.end() :]
    return [name for choice in choices for name in _expand(f"{head}{choice}{tail}")]


def _is_gzip(path: str) -> bool:
    try:
        with open(path, "rb") as file:
            return file.read(2) == b"\x1f\x8b"
    except OSError:
        return False
