"""Every kind of bad picture, caption, row, file and shard that we know of, each with the one report it must get.

`build_*` writes a source that holds every kind once beside good pictures, and returns {kind: (where, what)}: the end
of the report's place and the beginning of its reason.
"""

from __future__ import annotations

import io
import json
import os
import struct
import tarfile
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

Expected = dict[str, tuple[str, str]]
GOOD = 3  # good pictures in each source


def picture(format: str = "PNG", seed: int = 0, **options: object) -> bytes:
    """A picture of 40 x 32 noise, so that no codec makes it short."""
    noise = np.random.default_rng(seed).integers(0, 256, (32, 40, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, format, **options)
    return file.getvalue()


def chunk(kind: bytes, data: bytes, wrong_sum: bool = False) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data) ^ wrong_sum)


def png(width: int, height: int, *, depth: int = 8, color: int = 2, pixels: bytes, extra: bytes = b"") -> bytes:
    """A PNG made by hand: `pixels` is the content of its IDAT chunk, `extra` whole chunks before it."""
    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + extra + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def bad_pictures() -> dict[str, tuple[bytes, str]]:
    """{kind: (bytes, beginning of the report)}."""
    rows = zlib.compress((b"\0" + bytes(120)) * 32)
    whole = png(40, 32, pixels=rows)
    float_nan, float_low = np.full((4, 4), np.nan, np.float32), np.full((4, 4), -5, np.float32)
    floats = {}
    for name, values in (("nan", float_nan), ("negative", float_low)):
        file = io.BytesIO()
        Image.fromarray(values).save(file, "TIFF")
        floats[name] = file.getvalue()
    tiff = picture("TIFF")
    return {
        "empty file": (b"", "picture is empty (0 bytes)"),
        "random bytes": (np.random.default_rng(1).bytes(500), "picture is of an unknown kind"),
        "text": (b"a picture of a cat", "picture is of an unknown kind"),
        "html error page": (b"\n<!DOCTYPE html><html>404", "picture is an HTML page"),
        "svg": (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "picture is an SVG"),
        "svg with xml header": (b'<?xml version="1.0"?><svg/>', "picture is an XML file or SVG"),
        "pdf": (b"%PDF-1.7\n", "picture is a PDF"),
        "zip": (b"PK\x03\x04" + bytes(50), "picture is a zip archive"),
        "gzip": (b"\x1f\x8b" + bytes(50), "picture is gzip-compressed"),
        "photoshop": (b"8BPS" + bytes(50), "picture is a Photoshop file"),
        "heic": (b"\0\0\0\x18ftypheic" + bytes(50), "picture is HEIC or AVIF"),
        "avif": (b"\0\0\0\x18ftypavif" + bytes(50), "picture is HEIC or AVIF"),
        "format we do not open": (picture("PPM"), "picture is of an unknown kind"),
        "git lfs pointer": (b"version https://git-lfs.github.com/spec/v1\noid", "picture is a Git LFS pointer"),
        "truncated png": (picture()[:-600], "picture is broken ("),
        "png without its end": (whole[:-12], "picture is broken ("),
        "png header only": (whole[:40], "picture is broken ("),
        "png signature only": (whole[:8], "picture is broken (PNG whose header"),
        "png wrong checksum": (
            whole.replace(chunk(b"IDAT", rows), chunk(b"IDAT", rows, wrong_sum=True)),
            "picture is broken (",
        ),
        "png broken zlib": (png(40, 32, pixels=rows[:20] + b"\xff" * 20), "picture is broken ("),
        "png without pixels": (png(0, 0, pixels=zlib.compress(b"")), "picture "),
        "png bomb": (png(60_000, 60_000, pixels=rows), "picture has more than 89 megapixels"),
        "png a little too large": (png(10_000, 9_000, pixels=rows), "picture has more than 89 megapixels"),
        "truncated jpeg": (picture("JPEG")[:-300], "picture is broken ("),
        "truncated progressive jpeg": (picture("JPEG", progressive=True)[:-300], "picture is broken ("),
        "jpeg header only": (picture("JPEG")[:100], "picture is broken ("),
        "truncated webp": (picture("WEBP")[:-200], "picture is broken ("),
        "truncated gif": (picture("GIF")[:-200], "picture is broken ("),
        "gif without frames": (picture("GIF")[:781] + b";", "picture is broken ("),
        "truncated tiff": (tiff[: len(tiff) // 2], "picture is broken ("),
        "truncated lzw tiff": (picture("TIFF", compression="tiff_lzw")[:-50], "picture is broken ("),
        "truncated bmp": (picture("BMP")[:-200], "picture is broken ("),
        "tiff of nan": (floats["nan"], "picture has samples that are not finite"),
        "tiff of negative values": (floats["negative"], "picture has samples in [-5, -5]"),
    }


def bad_cells() -> dict[str, tuple[str, str]]:
    """{kind: (the caption as JSON, beginning of the report)}."""
    return {
        "empty caption": ('""', "caption is empty"),
        "white caption": ('" \\t\\n "', "caption is empty"),
        "null caption": ("null", "caption is empty"),
        "nan caption": ("NaN", "caption is empty"),
        "number caption": ("5", "caption is not text but int (5)"),
        "truth caption": ("true", "caption is not text but bool"),
        "object caption": ('{"en": "cat"}', "caption is not text but dict"),
        "empty list": ("[]", "caption is an empty list"),
        "list with an empty caption": ('["cat", ""]', "caption is empty"),
        "list with a null": ('["cat", null]', "caption is empty"),
        "list in a list": ('[["cat"]]', "caption is not text but list"),
        "half a surrogate pair": ('"cat \\ud83d"', "caption holds U+D83D"),
        "lost character": ('"caf\\ufffd"', "caption holds U+FFFD"),
        "control character": ('"c\\u0000t"', "caption holds U+0000"),
        "only control characters": ('"\\u0001\\u0002"', "caption holds U+0001"),
        "only invisible characters": ('"\\u200b\\u2060"', "caption has only invisible characters"),
    }


def build_jsonl(root: Path, outside: Path) -> Expected:
    """A folder with metadata.jsonl; `outside` is a folder beside it that no row may reach."""
    root.mkdir()
    outside.mkdir()
    (outside / "secret.png").write_bytes(picture())
    expected: Expected = {}
    lines: list[bytes] = []

    def add(kind: str, line: str | bytes, what: str, name: str | None = None) -> None:
        lines.append(line.encode() if isinstance(line, str) else line)
        place = f"metadata.jsonl row {len(lines)}"
        expected[kind] = (place if name is None else f"{place} ({name})", what)

    def new(name: str, data: bytes | None = None) -> str:
        (root / name).write_bytes(picture() if data is None else data)
        return name

    for number in range(GOOD):
        new(f"good{number}.png", picture(seed=number))
        lines.append(json.dumps({"file_name": f"good{number}.png", "text": f"good {number}"}).encode())
    for number, (kind, (data, what)) in enumerate(bad_pictures().items()):
        name = new(f"picture{number}.png", data)
        add(kind, json.dumps({"file_name": name, "text": kind}), what, name)
    for number, (kind, (cell, what)) in enumerate(bad_cells().items()):
        name = new(f"caption{number}.png")
        add(kind, f'{{"file_name": "{name}", "text": {cell}}}', what, name)

    add("no caption", f'{{"file_name": "{new("none.png")}"}}', "caption is empty", "none.png")
    add("missing file", '{"file_name": "gone.png", "text": "x"}', "picture is missing", "gone.png")
    (root / "folder.png").mkdir()
    add("folder as picture", '{"file_name": "folder.png", "text": "x"}', "picture is a folder", "folder.png")
    os.mkfifo(root / "pipe.png")
    add("pipe as picture", '{"file_name": "pipe.png", "text": "x"}', "picture is a special file", "pipe.png")
    up = f"../{outside.name}/secret.png"
    add("path that climbs out", f'{{"file_name": "{up}", "text": "x"}}', "path leads out of the data folder", up)
    absolute = str(root / "good0.png")
    add("absolute path", f'{{"file_name": "{absolute}", "text": "x"}}', "file_name is an absolute path", absolute)
    (root / "link.png").symlink_to(outside / "secret.png")
    add("link that leads out", '{"file_name": "link.png", "text": "x"}', "path leads out", "link.png")
    (root / "loop.png").symlink_to(root / "loop.png")
    add("link to itself", '{"file_name": "loop.png", "text": "x"}', "picture cannot be read", "loop.png")
    (root / "linked").symlink_to(outside)
    expected["folder link that leads out"] = ("linked", "link leads out of the data folder")
    add("name with nul", '{"file_name": "a\\u0000.png", "text": "x"}', "picture cannot be read", "a\\x00.png")
    long = "n" * 300 + ".png"
    add("name too long", f'{{"file_name": "{long}", "text": "x"}}', "picture cannot be read", long[:200])
    add("no file_name", '{"text": "x"}', "file_name is empty")
    add("empty file_name", '{"file_name": "", "text": "x"}', "file_name is", "")
    add("number as file_name", '{"file_name": 7, "text": "x"}', "file_name is no name ('7')")
    name = new("split.png")
    add("unknown split", f'{{"file_name": "{name}", "text": "x", "split": "prod"}}', "split is 'prod'", name)
    lines.append(f'{{"file_name": "{new("torn.png")}", "text": "x", "split": "train"}}'.encode())
    add("two splits", '{"file_name": "torn.png", "text": "y", "split": "test"}', "split is 'heldout', but", "torn.png")
    name = new("malformed.png")
    add("line cut off", f'{{"file_name": "{name}", "text": "x', "row is not JSON", name)
    add("line is a list", '["a.png", "x"]', "row is not a JSON object but list")
    name = new("twice.png")
    add("key twice", f'{{"file_name": "{name}", "text": "x", "text": "y"}}', "key 'text' appears twice", name)
    name = new("latin.png")
    add("line in latin-1", f'{{"file_name": "{name}", "text": "café"}}'.encode("latin-1"), "row is not UTF-8", name)
    new("unnamed.png")
    expected["picture without a row"] = ("unnamed.png", "picture has no metadata row")
    (root / "metadata.jsonl").write_bytes(b"\n".join(lines))
    return expected


def build_csv(root: Path) -> Expected:
    """A folder with metadata.csv."""
    root.mkdir()
    names = [f"good{number}.png" for number in range(GOOD)]
    for name in [*names, "empty.png", "short.png", "long.png", "latin.png", "quote.png"]:
        (root / name).write_bytes(picture())
    good = [f"{name},good {name}".encode() for name in names]
    bad = [b"empty.png,", b"short.png", b"long.png,a cat, a dog", b"latin.png,caf\xe9", b'gone.png,"cat" fish']
    bad.append(b'quote.png,"a cat')
    (root / "metadata.csv").write_bytes(b"\r\n".join([b"\xef\xbb\xbffile_name,text", *good, *bad]))
    reasons = {
        "csv: empty cell": ("(empty.png)", "caption is empty"),
        "csv: too few cells": ("(short.png)", "row has 1 cells; the header has 2"),
        "csv: too many cells": ("(long.png)", "row has 3 cells; the header has 2"),
        "csv: latin-1": ("(latin.png)", "row is not UTF-8"),
        "csv: text after a quote": ("", "row is not csv"),
        "csv: open quote": ("", "row is not csv"),
    }
    expected: Expected = {"csv: picture whose row is broken": ("quote.png", "picture has no metadata row")}
    for row, (kind, (name, what)) in enumerate(reasons.items(), GOOD + 2):
        expected[kind] = (f"metadata.csv row {row} {name}".strip(), what)
    return expected


def build_texts(root: Path) -> Expected:
    """A folder with a .txt beside each picture."""
    root.mkdir()
    for number in range(GOOD):
        (root / f"good{number}.png").write_bytes(picture(seed=number))
        (root / f"good{number}.txt").write_text(f"good {number}\n\n another {number}\r\n")
    (root / "README.txt").write_text("not a caption")
    for stem, text in {
        "empty": b"",
        "white": b" \n\n\t\n",
        "latin": b"a cat\na caf\xe9\n",
        "utf16": "a cat".encode("utf-16"),
        "control": b"a cat\n\na \x07dog",
        "large": b"x" * (1 << 21),
        "broken": b"a cat",
    }.items():
        (root / f"{stem}.txt").write_bytes(text)
        (root / f"{stem}.jpg").write_bytes(picture("JPEG")[: 200 if stem == "broken" else None])
    (root / "alone.png").write_bytes(picture())
    (root / "nothing.txt").write_text("a cat")
    (root / "vector.svg").write_text("<svg/>")
    (root / "vector.txt").write_text("a cat")
    return {
        "txt: empty": ("empty.txt", "caption is empty"),
        "txt: only white space": ("white.txt", "caption is empty"),
        "txt: latin-1": ("latin.txt row 2", "caption is not UTF-8"),
        "txt: utf-16": ("utf16.txt row 1", "caption is not UTF-8"),
        "txt: control character": ("control.txt row 3", "caption holds U+0007"),
        "txt: too large": ("large.jpg", "caption file is too large"),
        "txt: broken picture": ("broken.jpg", "picture is broken"),
        "txt: picture without a caption": ("alone.png", "picture has no .txt beside it"),
        "txt: caption without a picture": ("nothing.txt", "caption has no picture beside it"),
        "txt: format we do not open": ("vector.svg", "picture is an SVG"),
    }


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def build_shards(root: Path) -> Expected:
    """A folder of .tar files."""
    root.mkdir()
    members: list[tuple[str, bytes]] = []
    for n in range(GOOD):
        members += [(f"good{n}.png", picture(seed=n)), (f"good{n}.txt", f"good {n}".encode())]
    kinds = {
        "picture without a caption": ({"png": picture()}, ".png", "picture has no caption of the same key"),
        "caption without a picture": ({"txt": b"a cat"}, "", "caption has no picture of the same key"),
        "two pictures": ({"png": picture(), "jpg": picture("JPEG"), "txt": b"x"}, "", "key has several pictures (.png"),
        "empty caption": ({"png": picture(), "txt": b"\n"}, ".png", "caption is empty"),
        "latin-1": ({"png": picture(), "txt": b"\xe9"}, ".png row 1", "caption is not UTF-8"),
        "json cut off": ({"png": picture(), "json": b'{"text": "x'}, ".png", "caption's .json: row is not JSON"),
        "json is a list": ({"png": picture(), "json": b"[]"}, ".png", "caption's .json: row is not a JSON object"),
        "json without the column": ({"png": picture(), "json": b'{"caption": "x"}'}, ".png", "picture has no caption"),
        "json with a number": ({"png": picture(), "json": b'{"text": 5}'}, ".png", "caption is not text but int"),
        "broken picture": ({"png": picture()[:300], "txt": b"x"}, ".png", "picture is broken"),
        "large caption": ({"png": picture(), "txt": b"x" * (1 << 21)}, "", ".txt is too large"),
    }
    expected: Expected = {}
    for number, (kind, (parts, place, what)) in enumerate(kinds.items()):
        members += [(f"bad{number}.{suffix}", data) for suffix, data in parts.items()]
        expected[f"shard: {kind}"] = (f"a.tar member bad{number}{place}", what)
    write_tar(root / "a.tar", [*members, ("twice.png", picture()), ("twice.txt", b"x"), ("twice.txt", b"y")])
    expected["shard: caption twice"] = ("a.tar member twice", "key has two .txt")
    with tarfile.open(root / "link.tar", "w") as tar:
        link = tarfile.TarInfo("out.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    expected["shard: link"] = ("link.tar member out", ".png is a link or special file")
    whole = [("one.png", picture()), ("one.txt", b"one"), ("two.png", picture()), ("two.txt", b"two")]
    write_tar(root / "whole.tar", whole)
    data = (root / "whole.tar").read_bytes()
    (root / "whole.tar").unlink()
    with_two = data.index(b"two.png")
    (root / "cut.tar").write_bytes(data[: with_two + 900])
    expected["shard: cut in a picture"] = ("cut.tar member two.png", "shard is truncated")
    (root / "cut2.tar").write_bytes(data[:with_two])
    expected["shard: cut between pictures"] = ("cut2.tar after member one.txt", "shard is truncated (no end mark)")
    (root / "cut3.tar").write_bytes(data[: with_two + 100])
    expected["shard: cut in a header"] = ("cut3.tar after member one.txt", "shard is broken")
    (root / "torn.tar").write_bytes(data[:with_two] + b"\xff" * 512 + data[with_two + 512 :])
    expected["shard: damaged header"] = ("torn.tar after member one.txt", "shard is broken")
    (root / "zero.tar").write_bytes(b"")
    expected["shard: empty file"] = ("zero.tar", "shard is broken")
    (root / "text.tar").write_bytes(b"not a tar" * 100)
    expected["shard: no tar"] = ("text.tar", "shard is broken")
    write_tar(root / "none.tar", [])
    expected["shard: no members"] = ("none.tar", "shard has no pictures")
    return expected
