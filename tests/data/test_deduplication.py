"""Copies leave their folder with all that is known of them, and nothing else changes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from bad_data import picture
from PIL import Image

from ldm.cli.main import main
from ldm.data.dataset import CaptionedPictures, read_captioned

SMALL, LARGE, AGAIN, OTHER = "a/small.png", "b/large.png", "b/again.png", "b/other.png"


def draw(root: Path) -> None:
    """Three copies of one picture, of which the second is the largest, and another picture."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8))
    for name, edge in ((SMALL, 32), (LARGE, 96), (AGAIN, 64)):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        noise.resize((edge, edge), Image.Resampling.BICUBIC).save(root / name)
    (root / OTHER).write_bytes(picture(seed=5))


def as_jsonl(root: Path) -> None:
    rows = [{"file_name": name, "text": [name, "naïve ☕"], "n": i} for i, name in enumerate(everything())]
    (root / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


def as_csv(root: Path) -> None:
    """With a delimiter, line ends and a quoted line break that must stay."""
    lines = ["file_name;text;n", *(f'{name};"{name},\r\nnaïve ☕";{i}' for i, name in enumerate(everything()))]
    (root / "metadata.csv").write_bytes("\r\n".join(lines).encode())


def as_parquet(root: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    cells = {"file_name": everything(), "text": [[name, "naïve ☕"] for name in everything()], "n": [0, 1, 2, 3]}
    pyarrow.parquet.write_table(pyarrow.table(cells), root / "metadata.parquet")


def as_two_tables(root: Path) -> None:
    for folder in ("a", "b"):
        rows = [{"file_name": Path(name).name, "text": name} for name in everything() if name.startswith(folder)]
        (root / folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def as_texts(root: Path) -> None:
    for name in everything():
        (root / name).with_suffix(".txt").write_text(f"{name}\nnaïve ☕\n")


def everything() -> list[str]:
    return [SMALL, LARGE, AGAIN, OTHER]


def rows(folder: Path) -> dict[str, tuple[tuple[str, ...], dict[str, object], bytes]]:
    pictures: CaptionedPictures = read_captioned(folder, progress=False, holdout=0)
    return {str(row.locator): (row.captions, row.extra, row.read()) for row in pictures}


@pytest.mark.parametrize("form", [as_jsonl, as_csv, as_parquet, as_two_tables, as_texts])
def test_copies_move_with_their_captions(form: Callable[[Path], None], tmp_path: Path) -> None:
    root, to = tmp_path / "data", tmp_path / "data-duplicates"
    draw(root)
    form(root)
    before = rows(root)
    main(["data", "dedupe", str(root)])
    assert rows(root) == before and not to.exists()
    assert Image.open(tmp_path / "data-duplicates.png").size[0] > 0
    main(["data", "dedupe", str(root), "--apply"])
    left, moved = rows(root), rows(to)
    assert set(left) == {LARGE, OTHER} and set(moved) == {SMALL, AGAIN}  # the largest stays
    assert {**left, **moved} == before


def test_a_jsonl_row_that_stays_keeps_its_bytes(tmp_path: Path) -> None:
    root = tmp_path / "data"
    draw(root)
    lines = [f'{{ "file_name":"{name}",   "text": "{i}" }}' for i, name in enumerate(everything())]
    (root / "metadata.jsonl").write_text("\n".join(lines))
    main(["data", "dedupe", str(root), "--apply", "--to", str(tmp_path / "extra")])
    assert (root / "metadata.jsonl").read_text().splitlines() == [lines[1], lines[3]]
    assert (tmp_path / "extra/metadata.jsonl").read_text().splitlines() == [lines[0], lines[2]]


@pytest.mark.parametrize("form", [as_jsonl, as_texts])
def test_a_copy_without_a_caption_goes_first(form: Callable[[Path], None], tmp_path: Path) -> None:
    """The largest copy has none, so the largest of those that have one stays."""
    root = tmp_path / "data"
    draw(root)
    form(root)
    if form is as_texts:
        (root / LARGE).with_suffix(".txt").unlink()
    else:
        lines = [json.loads(line) for line in (root / "metadata.jsonl").read_text("utf-8").splitlines()]
        rows = [{**line, "text": "" if line["file_name"] == LARGE else [line["file_name"]]} for line in lines]
        (root / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    main(["data", "dedupe", str(root), "--apply"])
    assert not (root / LARGE).exists() and not (root / SMALL).exists()
    assert {str(row.locator) for row in read_captioned(root, progress=False, holdout=0)} == {AGAIN, OTHER}
    assert Image.open(tmp_path / "data-duplicates.png").width > 3 * 192  # a line of three


def test_no_chain_of_small_changes_is_a_group_and_named_pictures_stay(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each gray is near the next one only: the middle one is a copy of the first, the last of none that stays."""
    for name, level in (("a", 100), ("b", 102), ("c", 104)):
        Image.new("RGB", (16, 16), (level,) * 3).save(tmp_path / f"{name}.png")
    table = tmp_path / "metadata.jsonl"
    table.write_text("".join(json.dumps({"file_name": f"{name}.png", "text": name}) + "\n" for name in "abc"))
    sheet = ["--sheet", str(tmp_path.parent / "sheet.png")]
    main(["data", "dedupe", str(tmp_path), *sheet])
    assert "a.png (16x16): b.png (2.0)\n" in capsys.readouterr().out
    table.write_text(table.read_text().replace('"text": "c"', '"text": "c", "outline": "b.png"'))
    main(["data", "dedupe", str(tmp_path), *sheet])
    assert "3 pictures, none of them twice" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["data", "--to", "data/extra"], "--to: data/extra lies in data"),
        (["data", "--to", "there"], "--to: there is there already, perhaps of an earlier run; name a new folder"),
        (["shards.tar"], "shards.tar: expected a folder of pictures"),
    ],
)
def test_what_is_refused_changes_nothing(
    words: list[str], error: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    draw(tmp_path / "data")
    as_texts(tmp_path / "data")
    (tmp_path / "there").mkdir()
    (tmp_path / "shards.tar").write_bytes(b"")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as stopped:
        main(["data", "dedupe", *words, "--apply"])
    assert error in str(stopped.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_captions_of_another_column_count_and_a_damaged_picture_stays(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "data"
    draw(root)
    (root / "broken.png").write_bytes(b"no picture")
    rows = [{"file_name": name, "title": "" if name == LARGE else name} for name in [*everything(), "broken.png"]]
    (root / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    main(["data", "dedupe", str(root), "--column", "title", "--apply"])
    assert not (root / LARGE).exists() and (root / AGAIN).exists() and (root / "broken.png").exists()
    assert "broken.png" in capsys.readouterr().err
