"""Pictures that are bombs, two things at once, or not what their names say; and data paths that lead out of the folder.

The other malformed data sets are in tests/bad_data.py; here their kinds are counted.
"""

from __future__ import annotations

import io
import json
import struct
from pathlib import Path

import hostile
import pytest
from bad_data import build_csv, build_jsonl, build_shards, build_texts, picture, png, write_tar
from PIL import Image

from ldm.data.conditioned import ConditionedPictures
from ldm.data.dataset import BadDataError, read_captioned
from ldm.data.images import BadPictureError, decode

SIDE = 60_000  # 3.6 gigapixels: ten gigabytes as RGB


def test_there_are_many_kinds_of_bad_data(tmp_path: Path) -> None:
    kinds = build_jsonl(tmp_path / "a", tmp_path / "outside") | build_csv(tmp_path / "b")
    kinds |= build_texts(tmp_path / "c") | build_shards(tmp_path / "d")
    assert len(kinds) >= 60


def bombs() -> dict[str, bytes]:
    """{format: a small file that says it is 60,000 x 60,000 (WebP, whose edges end there: 16,383 x 16,383)}."""
    jpeg = bytearray(picture("JPEG"))
    frame = jpeg.index(b"\xff\xc0")
    jpeg[frame + 5 : frame + 9] = struct.pack(">HH", SIDE, SIDE)
    bmp = bytearray(picture("BMP"))
    bmp[18:26] = struct.pack("<ii", SIDE, SIDE)
    gif = bytearray(picture("GIF"))
    gif[6:10] = struct.pack("<HH", SIDE, SIDE)
    webp = bytearray(picture("WEBP", lossless=True))
    at = webp.index(b"VP8L") + 9
    bits = struct.unpack("<I", webp[at : at + 4])[0] & ~0x0FFFFFFF
    webp[at : at + 4] = struct.pack("<I", bits | 16382 | 16382 << 14)
    tiff = io.BytesIO()
    Image.new("RGB", (4, 4)).save(tiff, "TIFF", tiffinfo={})
    data = bytearray(tiff.getvalue())
    for tag in (256, 257):  # width, height
        entry = data.index(struct.pack("<HH", tag, 4)) if struct.pack("<HH", tag, 4) in data else None
        entry = data.index(struct.pack("<HHI", tag, 3, 1)) if entry is None else entry
        data[entry : entry + 12] = struct.pack("<HHII", tag, 4, 1, SIDE)
    return {
        "PNG": png(SIDE, SIDE, pixels=b""),
        "JPEG": bytes(jpeg),
        "BMP": bytes(bmp),
        "GIF": bytes(gif),
        "WEBP": bytes(webp),
        "TIFF": bytes(data),
    }


@pytest.mark.parametrize("format", ["PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF"])
def test_a_bomb_is_refused_by_its_header(format: str) -> None:
    with pytest.raises(BadPictureError, match="picture has more than 89 megapixels"):
        decode(bombs()[format])


@pytest.mark.parametrize("format", ["PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF"])
@pytest.mark.parametrize("suffix", [".png", ".jpg", ".gif"])
def test_a_name_does_not_decide_what_a_picture_is(format: str, suffix: str, tmp_path: Path) -> None:
    (tmp_path / f"cat{suffix}").write_bytes(picture(format))
    (tmp_path / "cat.txt").write_text("a cat")
    assert read_captioned(tmp_path, holdout=0, progress=False)[0].image().size == (40, 32)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "GIF", "WEBP"])
def test_a_picture_that_is_a_pickle_or_zip_as_well_is_a_picture_alone(format: str, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    for tail in (hostile.pickled(canary), b"PK\x03\x04" + bytes(30), b"<script>alert(1)</script>"):
        plain, both = decode(picture(format)), decode(picture(format) + tail)
        assert plain.tobytes() == both.tobytes()
    assert not canary.exists()


@pytest.mark.parametrize("kind", ["PPM", "EPS", "PDF", "ICO", "TGA", "PCX", "SGI", "IM", "JPEG2000"])
def test_other_decoders_are_never_asked(kind: str) -> None:
    file = io.BytesIO()
    Image.new("RGB", (16, 16), "red").save(file, kind)
    with pytest.raises(BadPictureError, match="picture is "):
        decode(file.getvalue())


OUT = {
    "above": ("../outside/secret.png", "path leads out"),
    "above, later": ("x/../../outside/secret.png", "path leads out"),
    "absolute": ("{outside}/secret.png", "absolute path"),
    "link": ("link.png", "path leads out"),
    "through a linked folder": ("linked/secret.png", "path leads out"),
    "nul": ("cat.png\0.png", "cannot be read"),
    "device": ("/dev/zero", "absolute path"),
    "empty": ("", "file_name is"),
    "number": (7, "file_name is no name"),
    "long": ("n" * 5000, "cannot be read"),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/secret.png").write_bytes(picture())
    folder = tmp_path / "data"
    (folder / "x").mkdir(parents=True)
    (folder / "cat.png").write_bytes(picture())
    (folder / "link.png").symlink_to(tmp_path / "outside/secret.png")
    return folder


@pytest.mark.parametrize("kind", OUT)
def test_neither_column_reads_beyond_the_folder(kind: str, folder: Path) -> None:
    name, said = OUT[kind]
    name = name.format(outside=folder.parent / "outside") if isinstance(name, str) else name
    if kind == "through a linked folder":
        (folder / "linked").symlink_to(folder.parent / "outside")
    good = {"file_name": "cat.png", "text": "a cat", "sketch": name, "split": "train"}
    (folder / "metadata.jsonl").write_text(json.dumps({**good, "file_name": name, "sketch": "cat.png"}))
    with pytest.raises(BadDataError, match=said):
        read_captioned(folder, progress=False)
    (folder / "metadata.jsonl").write_text(json.dumps(good))
    (folder / "link.png").unlink()
    if kind == "link":
        (folder / "x/link.png").symlink_to(folder.parent / "outside/secret.png")
        (folder / "metadata.jsonl").write_text(json.dumps({**good, "sketch": "x/link.png"}))
    with pytest.raises(BadDataError, match="(?s)sketch|link leads out") as refused:
        ConditionedPictures.read(read_captioned(folder, progress=False), condition_column="sketch", progress=False)
    assert said in str(refused.value) or "leads out" in str(refused.value)


def test_a_shard_is_never_unpacked(tmp_path: Path) -> None:
    write_tar(
        tmp_path / "evil.tar",
        [("../../evil.png", picture()), ("../../evil.txt", b"a cat"), ("/abs.png", picture()), ("/abs.txt", b"a dog")],
    )
    rows = read_captioned(str(tmp_path / "evil.tar"), holdout=0, progress=False)
    assert [row.image().size for row in rows] == [(40, 32)] * 2
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["evil.tar"]
