"""What sources may also look like: split folders, other delimiters, classes of the Hub, captions of several lines."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from bad_data import picture, write_tar
from PIL import Image

from ldm.data.dataset import BadDataError, CaptionedPictures, read_captioned
from ldm.data.labels import Labels
from ldm.pipelines.loading import read_prompts


def read(source: str | Path, **options: object) -> CaptionedPictures:
    return read_captioned(source, progress=False, **options)  # type: ignore[arg-type]


def put(file: Path, seed: int = 0) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(picture(seed=seed))


# --- captions of several lines ---------------------------------------------------------------------------------------

CAPTIONS = {
    "line feed": ("a red\nheart", "a red heart"),
    "empty line": ("a red\n\n heart\n", "a red heart"),
    "carriage return": ("a red\r\nheart", "a red heart"),
    "line separator": ("a red\u2028heart", "a red heart"),
    "paragraph separator": ("\u2029a red \u2029 heart", "a red heart"),
    "next line": ("a red\x85heart", "a red heart"),
    "vertical tab and form feed": ("a\x0bred\x0cheart", "a red heart"),
    "record separators": ("a\x1cred\x1dheart\x1eof gold", "a red heart of gold"),
    "inner spaces stay": ("a  red heart", "a  red heart"),
}


def as_jsonl(root: Path, caption: str) -> Path:
    put(root / "a.png")
    (root / "metadata.jsonl").write_text(json.dumps({"file_name": "a.png", "text": [caption, "b"]}), "utf-8")
    return root


def as_shard(root: Path, caption: str) -> Path:
    root.mkdir()
    row = json.dumps({"text": [caption, "b"]}).encode()
    write_tar(root / "0.tar", [("a.png", picture()), ("a.json", row)])
    return root


@pytest.mark.parametrize("build", [as_jsonl, as_shard])
@pytest.mark.parametrize("kind", CAPTIONS)
def test_a_caption_of_several_lines_is_one_caption(
    kind: str, build: Callable[[Path, str], Path], tmp_path: Path
) -> None:
    caption, expected = CAPTIONS[kind]
    (row,) = read(build(tmp_path / "data", caption))
    assert row.captions == (expected, "b")
    # and no file that keeps one prompt a line takes it for several
    (tmp_path / "prompts.txt").write_text("\n".join(row.captions) + "\n", "utf-8")
    assert read_prompts(tmp_path / "prompts.txt") == row.captions


def test_a_text_file_has_a_caption_a_line_and_u2028_ends_none(tmp_path: Path) -> None:
    put(tmp_path / "a.png")
    (tmp_path / "a.txt").write_bytes("a red\u2028heart\r\n\nblue".encode())
    assert read(tmp_path)[0].captions == ("a red heart", "blue")


def test_prompts_are_split_at_line_feeds_alone(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    for text, expected in (
        ("a\u2028b\x85c\x0bd\n\nlast\n", ("a\u2028b\x85c\x0bd", "last")),
        ("no end", ("no end",)),
        ("", ()),
    ):
        file.write_bytes(text.encode())
        assert read_prompts(file) == expected
    assert read_prompts(tmp_path / "none.txt") == ()


# --- split folders ---------------------------------------------------------------------------------------------------


def with_metadata_each(root: Path, folders: list[str]) -> None:
    for n, folder in enumerate(folders):
        put(root / folder / f"{n}.png", n)
        (root / folder / "metadata.jsonl").write_text(json.dumps({"file_name": f"{n}.png", "text": f"caption {n}"}))


def with_one_metadata(root: Path, folders: list[str]) -> None:
    rows = []
    for n, folder in enumerate(folders):
        put(root / folder / f"{n}.png", n)
        rows.append(f"{folder}/{n}.png,caption {n}")
    (root / "metadata.csv").write_text("\n".join(["file_name,text", *rows]))


def with_texts(root: Path, folders: list[str]) -> None:
    for n, folder in enumerate(folders):
        put(root / folder / f"{n}.png", n)
        (root / folder / f"{n}.txt").write_text(f"caption {n}")


@pytest.mark.parametrize("build", [with_metadata_each, with_one_metadata, with_texts])
@pytest.mark.parametrize(
    ("folders", "heldout"),
    [
        (["train", "test"], [1]),
        (["train", "validation", "test"], [1, 2]),
        (["Training/a", "dev/a", "val", "eval"], [1, 2, 3]),
        (["pictures/train/x", "pictures/test/y"], [1]),
        (["train", "train/test"], []),  # no test folder beside train: a subject of its own, say
    ],
)
def test_folders_named_as_splits_split(
    build: Callable[[Path, list[str]], None],
    folders: list[str],
    heldout: list[int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    root = tmp_path / "data"
    build(root, folders)
    rows = read_captioned(root, holdout=0.0)
    assert sorted(row.captions[0] for row in rows.heldout) == [f"caption {n}" for n in heldout]
    printed = capsys.readouterr().err
    if heldout:
        assert (
            f"{len(folders) - len(heldout)} train, {len(heldout)} heldout" in printed and "split by its fo" in printed
        )
        assert len(read(root, caption_columns=[]).heldout) == len(heldout)
    else:
        assert "split by" not in printed


def test_split_folders_are_those_of_datasets(tmp_path: Path) -> None:
    import datasets

    with_metadata_each(tmp_path / "data", ["train", "train", "test", "validation"])
    (tmp_path / "data/train/metadata.jsonl").write_text(
        "\n".join(json.dumps({"file_name": f"{n}.png", "text": f"caption {n}"}) for n in (0, 1))
    )
    theirs = datasets.load_dataset("imagefolder", data_dir=str(tmp_path / "data"), cache_dir=str(tmp_path / "cache"))
    ours = read(tmp_path / "data", holdout=0.0)
    assert set(theirs["train"]["text"]) == {row.captions[0] for row in ours.train}
    assert {*theirs["test"]["text"], *theirs["validation"]["text"]} == {row.captions[0] for row in ours.heldout}


def test_one_split_folder_alone_says_nothing(tmp_path: Path) -> None:
    for name in ("train", "test"):
        with_texts(tmp_path / name, [name] * 3)
        rows = read(tmp_path / name, holdout=0.0)
        assert len(rows.train) == 3


def test_a_split_column_overrules_the_folders(tmp_path: Path) -> None:
    put(tmp_path / "train/a.png", 1)
    put(tmp_path / "test/b.png", 2)
    put(tmp_path / "test/c.png", 3)
    (tmp_path / "metadata.csv").write_text(
        "file_name,text,split\ntrain/a.png,a,validation\ntest/b.png,b,train\ntest/c.png,c,\n"
    )
    assert [row.split for row in read(tmp_path, holdout=0.0)] == ["heldout", "train", "heldout"]


def test_one_picture_in_both_splits_is_a_problem(tmp_path: Path) -> None:
    put(tmp_path / "train/a.png")
    put(tmp_path / "test/b.png", 1)
    (tmp_path / "train/metadata.csv").write_text("file_name,text\na.png,a\n")
    (tmp_path / "test/metadata.csv").write_text("file_name,text,split\nb.png,b,\n../train/a.png,c,test\n")
    with pytest.raises(BadDataError, match=r"split is '(train|heldout)', but '(train|heldout)' in "):
        read(tmp_path)


# --- other delimiters ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
@pytest.mark.parametrize("quoted", [False, True])
def test_csv_of_any_common_delimiter(delimiter: str, quoted: bool, tmp_path: Path) -> None:
    put(tmp_path / "a.png")
    put(tmp_path / "b.png", 1)
    texts = ["a, b; c | d\te", "x"] if quoted else ["a cat", "x"]
    rows = [("file_name", "text"), ("a.png", texts[0]), ("b.png", texts[1])]
    quote = '"' if quoted else ""
    (tmp_path / "metadata.csv").write_text(
        "\r\n".join(delimiter.join(f"{quote}{cell}{quote}" for cell in row) for row in rows), newline=""
    )
    assert [row.captions for row in read(tmp_path)] == [(text,) for text in texts]


def test_a_csv_without_file_name_names_its_columns(tmp_path: Path) -> None:
    put(tmp_path / "a.png")
    (tmp_path / "metadata.csv").write_text("filename;text\na.png;cat\n")
    with pytest.raises(BadDataError, match="'file_name' is missing: .* has filename, text; the nearest is 'filename'"):
        read(tmp_path)


def test_commas_in_semicolon_captions_and_the_other_way_around(tmp_path: Path) -> None:
    put(tmp_path / "a.png")
    for header, row in (("file_name;text", "a.png;red, blue"), ("file_name,text", "a.png,red; blue")):
        (tmp_path / "metadata.csv").write_text(f"{header}\n{row}\n")
        assert read(tmp_path)[0].captions[0] in ("red, blue", "red; blue")


# --- data sets of the Hub --------------------------------------------------------------------------------------------


def saved(root: Path, features: dict[str, object], **columns: list[object]) -> Path:
    import datasets

    cells = [{"bytes": picture(seed=n), "path": None} for n in range(4)]
    everything = datasets.Features({"image": datasets.Image(), **features})
    datasets.Dataset.from_dict({"image": cells, **columns}, everything).save_to_disk(root)
    return root


def test_a_class_label_column_holds_the_names_of_its_classes(tmp_path: Path) -> None:
    from datasets import ClassLabel, Value

    kinds = {"text": Value("string"), "kind": ClassLabel(names=["cat", "dog", "fox"])}
    root = saved(tmp_path / "set", kinds, text=["a", "b", "c", "d"], kind=[1, 0, 1, 2])
    pictures = read(root, holdout=0.0)
    assert [row.extra["kind"] for row in pictures] == ["dog", "cat", "dog", "fox"]
    labels = Labels.read(pictures, "kind")
    assert labels.names == ("cat", "dog", "fox") and labels.ids(pictures).tolist() == [1, 0, 1, 2]
    assert [row.captions for row in read(root, caption_columns=["kind"])] == [("dog",), ("cat",), ("dog",), ("fox",)]


def test_missing_classes_are_empty(tmp_path: Path) -> None:
    from datasets import ClassLabel

    root = saved(tmp_path / "set", {"kind": ClassLabel(names=["cat", "dog"])}, kind=[1, None, -1, 0])
    pictures = read(root, caption_columns=[], holdout=0.0)
    assert [row.extra.get("kind") for row in pictures] == ["dog", None, None, "cat"]
    with pytest.raises(BadDataError, match="2 problems"):
        Labels.read(pictures, "kind")


def test_a_data_set_of_pictures_alone(tmp_path: Path) -> None:
    rows = read(saved(tmp_path / "set", {}), caption_columns=[])
    assert [row.read() for row in rows] == [picture(seed=n) for n in range(4)]
    assert [row.captions for row in rows] == [()] * 4
    with pytest.raises(BadDataError, match="column 'text' is missing"):
        read(tmp_path / "set")


# --- names and sizes -------------------------------------------------------------------------------------------------


def test_a_source_has_one_spelling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path / "data/a.png")
    (tmp_path / "data/a.txt").write_text("cat")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("data", "data/", "./data", "./data//", Path("data")):
        rows = read(name)
        assert (rows.source, rows[0].where) == ("data", "data/a.png"), name
    assert read("~/data/").source == str(tmp_path / "data")
    with pytest.raises(BadDataError, match=r"folder is missing: owner/name"):
        read("./owner/name")  # no name on the Hub


def test_pictures_that_make_poor_squares_are_named(tmp_path: Path) -> None:
    sizes = [(1, 1), (4, 4000), (64, 64), (200, 64), (64, 191), (63, 64), (300, 90)]
    for n, size in enumerate(sizes):
        Image.new("RGB", size).save(tmp_path / f"{n}.png")
        (tmp_path / f"{n}.txt").write_text(f"caption {n}")
    pictures = read(tmp_path)
    assert pictures.unfit(64) == [
        f"3 pictures enlarged to 64 x 64:\n  enlarged from 1 x 1: {tmp_path}/0.png\n"
        f"  enlarged from 4 x 4000: {tmp_path}/1.png\n  enlarged from 63 x 64: {tmp_path}/5.png",
        f"3 pictures cropped to a sliver:\n  cropped to a sliver (4 of 4000 pixels): {tmp_path}/1.png\n"
        f"  cropped to a sliver (64 of 200 pixels): {tmp_path}/3.png\n"
        f"  cropped to a sliver (90 of 300 pixels): {tmp_path}/6.png",
    ]
    assert "and 4 more" in pictures.unfit(256)[0]
    assert pictures.select([2, 4]).unfit(64) == []
    assert read(tmp_path, check=False).unfit(64) == []
