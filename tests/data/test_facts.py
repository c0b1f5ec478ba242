"""What is known of pictures: each is decoded once, by one rank, however often a run starts; changes are noticed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import road
from bad_data import picture
from PIL import Image

from ldm.data import facts as facts_module
from ldm.data.conditioned import ConditionedPictures
from ldm.data.dataset import BadDataError, CaptionedPictures, read_captioned
from ldm.data.facts import KIND, Fact, hash_content
from ldm.data.rows import Stamp

ROOT = Path(__file__).parents[2]


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """24 pictures, which count as old as soon as they are made."""
    monkeypatch.setattr(facts_module, "SETTLED", -1.0)
    return road.draw_folder(tmp_path / "data")


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The lengths of the files that have been decoded since the list was cleared."""
    sizes: list[int] = []
    decode = facts_module.decode

    def counted(content: bytes, *arguments: Any) -> Image.Image:
        sizes.append(len(content))
        return decode(content, *arguments)

    monkeypatch.setattr("ldm.data.facts.decode", counted)
    monkeypatch.setattr("ldm.data.dataset.decode", counted)
    yield sizes


def read(source: str | Path, folder: Path, **options: Any) -> CaptionedPictures:
    return read_captioned(source, facts=folder, progress=False, **options)


def as_folder(data: Path) -> Path:
    return data


def as_shards(data: Path) -> Path:
    (data.parent / "shards").mkdir()
    with tarfile.open(data.parent / "shards/0.tar", "w") as tar:
        for i, row in enumerate(read_captioned(data, progress=False)):
            (data.parent / "caption").write_text(row.captions[0])
            tar.add(data / row.locator, f"{i}.png")
            tar.add(data.parent / "caption", f"{i}.txt")
    return data.parent / "shards"


def as_data_set(data: Path) -> Path:
    import datasets

    columns: dict[str, list[Any]] = {"image": [], "text": []}
    for row in read_captioned(data, progress=False):
        columns["image"].append({"bytes": row.read(), "path": None})
        columns["text"].append(row.captions[0])
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    datasets.Dataset.from_dict(columns, features=features).save_to_disk(str(data.parent / "saved"))
    return data.parent / "saved"


@pytest.mark.parametrize("make", [as_folder, as_shards, as_data_set])
def test_a_picture_is_decoded_once_and_never_again(
    data: Path, tmp_path: Path, decoded: list[int], make: Callable[[Path], Path]
) -> None:
    source = make(data)
    decoded.clear()
    first = read(source, tmp_path / "facts")
    assert len(decoded) == 24
    decoded.clear()
    again = read(source, tmp_path / "facts")
    assert decoded == []
    for one, other in zip(first, again, strict=True):
        assert one.content == other.content == hash_content(one.read())
        assert one.size == other.size == one.image().size
    decoded.clear()
    assert read(source, tmp_path / "elsewhere")[0].content == first[0].content
    assert len(decoded) == 24


def test_without_a_folder_nothing_is_remembered(data: Path, decoded: list[int]) -> None:
    before = sorted(data.parent.rglob("*"))
    for _ in range(2):
        decoded.clear()
        assert read_captioned(data, progress=False)[0].content
        assert len(decoded) == 24
    assert sorted(data.parent.rglob("*")) == before


def test_only_new_and_changed_pictures_are_decoded(data: Path, tmp_path: Path, decoded: list[int]) -> None:
    before = read(data, tmp_path)
    Image.new("RGB", (30, 20), "purple").save(data / "images/red_heart.png")
    decoded.clear()
    after = read(data, tmp_path)
    assert len(decoded) == 1
    changed = [i for i in range(24) if before[i].content != after[i].content]
    assert [after[i].locator for i in changed] == ["images/red_heart.png"]
    assert after[changed[0]].size == (30, 20)


def test_a_picture_changed_behind_its_times_and_size_is_noticed(data: Path, tmp_path: Path, decoded: list[int]) -> None:
    file, bmp = data / "images/red_heart.png", data / "images/picture.bmp"
    contents = set()
    for color in ("red", "purple", "brown"):
        Image.new("RGB", (9, 9), color).save(bmp)
        file.write_bytes(bmp.read_bytes())  # detected by content, not by name; of the same length for every color
        os.utime(file, ns=(10**18, 10**18))
        bmp.unlink()
        contents.add(next(row.content for row in read(data, tmp_path) if row.locator == "images/red_heart.png"))
        assert file.stat().st_mtime_ns == 10**18
    assert len(contents) == 3


def test_a_young_file_is_decoded_again_for_its_clock_may_be_coarse(
    data: Path, tmp_path: Path, decoded: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two contents of one size in one tick of the clock have one stamp."""
    monkeypatch.setattr(facts_module, "SETTLED", 3600.0)
    store = type(read_captioned(data, progress=False)._store)

    def stamp(self: Any, locator: str) -> Stamp:
        return f"{locator}, always the same", os.stat(data / locator).st_mtime

    monkeypatch.setattr(store, "stamp", stamp)
    read(data, tmp_path)
    Image.new("RGB", (30, 20), "purple").save(data / "images/red_heart.png")
    assert next(row.size for row in read(data, tmp_path) if row.locator == "images/red_heart.png") == (30, 20)


def test_broken_pictures_are_remembered_with_their_reason(data: Path, tmp_path: Path, decoded: list[int]) -> None:
    (data / "images/red_heart.png").write_bytes(b"%PDF-1.7 not a picture")
    messages = set()
    for _ in range(2):
        decoded.clear()
        with pytest.raises(BadDataError, match=r"picture is a PDF; expected one of PNG.*red_heart\.png") as caught:
            read(data, tmp_path)
        messages.add(str(caught.value))
    assert decoded == [] and len(messages) == 1
    assert len(read(data, tmp_path, on_bad="skip")) == 23
    (data / "images/red_heart.png").write_bytes(picture())
    assert len(read(data, tmp_path)) == 24
    (data / "images/red_heart.png").unlink()
    with pytest.raises(BadDataError, match="picture is missing"):
        read(data, tmp_path)


def test_second_pictures_are_remembered_too(data: Path, tmp_path: Path, decoded: list[int]) -> None:
    file = data / "metadata.jsonl"
    rows = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
    (data / "sketches").mkdir()
    for i, row in enumerate(rows):
        row["sketch"] = f"sketches/{i}.png"
        Image.new("RGB", (8 + i, 8), "gray").save(data / row["sketch"])
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    for expected in (48, 0):
        decoded.clear()
        pictures = ConditionedPictures.read(
            read(data, tmp_path), condition_column="sketch", progress=False, facts=tmp_path
        )
        assert len(decoded) == expected
        second = pictures.condition(5)
        assert second.size == (13, 8) and second.content == hash_content(second.read())
        assert pictures.train.all_pictures[-1].content


def test_damaged_facts_are_pictures_to_decode_again(data: Path, tmp_path: Path, decoded: list[int]) -> None:
    first = read(data, tmp_path)
    file = tmp_path / KIND.file
    content = bytearray(file.read_bytes())
    content[content.index(first[3].content) + 5] ^= 1
    file.write_bytes(content)
    decoded.clear()
    assert [row.content for row in read(data, tmp_path)] == [row.content for row in first]
    assert len(decoded) == 1
    decoded.clear()
    file.write_bytes(b"something else")
    assert [row.content for row in read(data, tmp_path)] == [row.content for row in first]
    assert len(decoded) == 24
    decoded.clear()
    read(data, tmp_path)
    assert decoded == []


def test_a_folder_that_cannot_be_written_costs_time_and_a_line(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("no folder")
    assert len(read(data, tmp_path / "file/cache")) == 24
    assert "what is known of the pictures can't be remembered: " in capsys.readouterr().err


def test_facts_are_unpacked_as_they_were_packed() -> None:
    for fact in (Fact(b"c" * 16, (3, 4)), Fact(bytes(16), (0, 0), "picture is broken (…)")):
        assert Fact.unpack(fact.pack()) == fact


RANK = """
import sys
from pathlib import Path
from ldm.data import facts
from ldm.data.dataset import read_captioned

facts.SETTLED, facts.CHUNK, facts.SAVE_SECONDS = -1.0, 2, 0.0
decoded, decode = [], facts.decode
def slow(content):
    import time
    decoded.append(content)
    time.sleep(0.05)
    return decode(content)
facts.decode = slow
facts.ThreadPoolExecutor = lambda threads: original(1)
from concurrent.futures import ThreadPoolExecutor as original
pictures = read_captioned(sys.argv[1], facts=Path(sys.argv[2]), progress=False)
assert len(pictures) == 24 and all(row.content for row in pictures)
print(len(decoded))
"""


def test_ranks_share_the_pictures(data: Path, tmp_path: Path) -> None:
    def rank(number: int) -> subprocess.Popen[str]:
        ranks = {"RANK": str(number), "WORLD_SIZE": "2", "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-c", RANK, str(data), str(tmp_path / "facts")]
        return subprocess.Popen(command, env={**os.environ, **ranks}, stdout=subprocess.PIPE, text=True)

    processes = [rank(0), rank(1)]
    counts = [int(process.communicate(timeout=60)[0]) for process in processes]
    assert all(process.returncode == 0 for process in processes)
    assert min(counts) > 0
    assert 24 <= sum(counts) <= 30, counts  # a chunk that two took at once is decoded twice
    alone = rank(1)  # whose other rank never starts
    assert alone.communicate(timeout=60)[0] == "0\n"
