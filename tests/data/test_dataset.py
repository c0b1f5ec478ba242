"""Every source gives the same rows for the same pictures, and everything bad in them is reported once, by place."""

from __future__ import annotations

import csv
import gc
import hashlib
import json
import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from bad_data import GOOD, Expected, build_csv, build_jsonl, build_shards, build_texts, picture, write_tar

from ldm.data.dataset import BadDataError, CaptionedPictures, read_captioned, require_training, split_of
from ldm.data.rows import Problem

CAPTIONS = [("a red heart",), ("pizza", "a slice of pizza"), ("naïve café ☕",), ("woman firefighter: dark skin tone",)]
PICTURES = [picture(seed=seed) for seed in range(4)]


def read(source: str | Path, **options: object) -> CaptionedPictures:
    return read_captioned(source, progress=False, **options)  # type: ignore[arg-type]


def as_jsonl(root: Path) -> str:
    pictures(root)
    cells = [captions[0] if len(captions) == 1 else captions for captions in CAPTIONS]
    lines = [json.dumps({"file_name": f"{n}.png", "text": cell}) for n, cell in enumerate(cells)]
    (root / "metadata.jsonl").write_text("\n".join(lines))
    return str(root)


def as_csv(root: Path) -> str:
    pictures(root)
    with open(root / "metadata.csv", "w", newline="", encoding="utf-8") as file:
        # several rows of one picture
        csv.writer(file).writerows(
            [("file_name", "text"), *((f"{n}.png", text) for n, captions in enumerate(CAPTIONS) for text in captions)]
        )
    return str(root)


def as_parquet(root: Path) -> str:
    import pyarrow
    import pyarrow.parquet

    pictures(root)
    names = [f"{n}.png" for n in range(4)]
    table = pyarrow.table({"file_name": names, "text": [list(captions) for captions in CAPTIONS]})
    pyarrow.parquet.write_table(table, root / "metadata.parquet")
    return str(root)


def as_texts(root: Path) -> str:
    pictures(root / "below")
    for n, captions in enumerate(CAPTIONS):
        (root / "below" / f"{n}.txt").write_text("\n".join(captions), encoding="utf-8")
    return str(root)


def as_saved_data_set(root: Path) -> str:
    import datasets

    features = datasets.Features({"image": datasets.Image(), "text": datasets.List(datasets.Value("string"))})
    cells = [{"bytes": data, "path": None} for data in PICTURES]
    data = datasets.Dataset.from_dict({"image": cells, "text": [list(texts) for texts in CAPTIONS]}, features)
    data.save_to_disk(root)
    return str(root)


def as_shards(root: Path) -> str:
    root.mkdir()
    for shard in range(2):
        members: list[tuple[str, bytes]] = []
        for n in (2 * shard, 2 * shard + 1):
            members += [(f"{n}.png", PICTURES[n]), (f"{n}.txt", "\n".join(CAPTIONS[n]).encode())]
        write_tar(root / f"00{shard}.tar", members)
    return str(root / "{000..001}.tar")


def as_shards_with_json(root: Path) -> str:
    root.mkdir()
    members: list[tuple[str, bytes]] = []
    for n in range(4):
        row = json.dumps({"text": CAPTIONS[n]}).encode()
        members += [(f"k/{n}.json", row), (f"k/{n}.txt", b"other"), (f"k/{n}.png", PICTURES[n])]
    write_tar(root / "all.tar", members)
    return str(root)


def pictures(root: Path) -> None:
    root.mkdir(parents=True)
    for n, data in enumerate(PICTURES):
        (root / f"{n}.png").write_bytes(data)


SOURCES = [as_jsonl, as_csv, as_parquet, as_texts, as_saved_data_set, as_shards, as_shards_with_json]


@pytest.mark.parametrize("build", SOURCES)
def test_every_source_gives_the_same_rows(build: Callable[[Path], str], tmp_path: Path) -> None:
    rows = read(build(tmp_path / "data"))
    assert [row.captions for row in rows] == CAPTIONS
    assert [row.read() for row in rows] == PICTURES
    assert all(row.split == split_of(row.captions[0], 0.05) for row in rows)
    assert len({row.where for row in rows}) == 4 and all("data" in row.where for row in rows)
    again = pickle.loads(pickle.dumps(rows))  # what a DataLoader's worker gets
    assert [(row.captions, row.read()) for row in again] == list(zip(CAPTIONS, PICTURES, strict=True))
    assert np.asarray(again[1].image()).shape == (32, 40, 3)


def test_split_is_a_fixed_function_of_the_caption() -> None:
    for caption in ("red heart", "naïve"):
        share = int.from_bytes(hashlib.sha256(caption.encode()).digest()[:4], "big") / 2**32
        assert split_of(caption, share) == "train"
        assert split_of(caption, np.nextafter(share, 1)) == "heldout"
    heldout = sum(split_of(f"caption {n}", 0.05) == "heldout" for n in range(20_000))
    assert abs(heldout - 1000) < 4 * np.sqrt(20_000 * 0.05 * 0.95)
    assert split_of("x", 0.0) == "train"


def test_no_picture_to_train_on_is_an_error_that_names_the_key(tmp_path: Path) -> None:
    for n in range(8):
        (tmp_path / f"{n}.png").write_bytes(picture(seed=n))
        (tmp_path / f"{n}.txt").write_text("face")  # whose hash lies in the first 5 %
    with pytest.raises(BadDataError, match=r"all 8 pictures of .*captioned 'face', are held out; lower data\.holdout"):
        require_training(read(tmp_path))
    require_training(read(tmp_path, holdout=0.0))
    (tmp_path / "0.txt").write_text("another face")
    require_training(read(tmp_path))


def test_split_column_and_views(tmp_path: Path) -> None:
    names = ["train", "heldout", "test", "Validation", None, ""]
    lines = []
    for n, split in enumerate(names):
        (tmp_path / f"{n}.png").write_bytes(picture(seed=n))
        row = {"file_name": f"{n}.png", "text": f"caption {n}", "split": split, "composition": n == 2, "tags": ["x"]}
        lines.append(json.dumps(row))
    lines.append('{"file_name": "5.png", "text": "later", "split": "heldout"}')  # names what the first row left open
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    rows = read(tmp_path, holdout=0.0)
    assert [row.split for row in rows] == ["train", "heldout", "heldout", "heldout", "train", "heldout"]
    assert [row.captions[0] for row in rows.train] == ["caption 0", "caption 4"]
    assert [row.captions[0] for row in rows.heldout] == ["caption 1", "caption 2", "caption 3", "caption 5"]
    assert [row.captions[0] for row in rows.heldout[1:3].select([1, 0])] == ["caption 3", "caption 2"]
    assert rows[2].extra == {"composition": True} and rows[-1].captions == ("caption 5", "later")
    assert len(rows.train.heldout) == 0 and repr(rows).endswith("2 train, 4 heldout)")
    with pytest.raises(IndexError):
        rows[6]


def test_several_columns_may_have_gaps(tmp_path: Path) -> None:
    for n in range(3):
        (tmp_path / f"{n}.png").write_bytes(picture(seed=n))
    (tmp_path / "metadata.csv").write_text("file_name,short,long\n0.png,cat,a cat\n1.png,dog,\n2.png,fox,fox\n")
    rows = read(tmp_path, caption_columns=["short", "long"])
    assert [row.captions for row in rows] == [("cat", "a cat"), ("dog",), ("fox",)]


def test_metadata_in_folders_below_and_links_inside(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name / "images").mkdir(parents=True)
        (tmp_path / name / "images" / "x.png").write_bytes(picture())
        (tmp_path / name / "metadata.csv").write_text(f"file_name,text\nimages/x.png,{name}\n")
    (tmp_path / "b" / "y.png").symlink_to(tmp_path / "a" / "images" / "x.png")
    with open(tmp_path / "b" / "metadata.csv", "a") as file:
        file.write("./y.png,y\n../a/images/x.png,also a\n")
    rows = read(tmp_path)
    assert [(row.captions, row.locator) for row in rows] == [
        (("a", "also a"), "a/images/x.png"),
        (("b",), "b/images/x.png"),
        (("y",), "b/y.png"),
    ]


def test_reports_do_not_reveal_whether_files_outside_exist(tmp_path: Path) -> None:
    (tmp_path / "data/below").mkdir(parents=True)
    (tmp_path / "there.png").write_bytes(picture())
    names = ["../there.png", "../none.png", "below/../../there.png", "below/..", "..", "below/../../none.png"]
    (tmp_path / "data/away.png").symlink_to("../there.png")
    lines = [json.dumps({"file_name": name, "text": "x"}) for name in [*names, "away.png"]]
    (tmp_path / "data/metadata.jsonl").write_text("\n".join(lines))
    with pytest.raises(BadDataError) as caught:
        read(tmp_path / "data")
    kinds = [problem.what for problem in caught.value.problems]
    assert (
        kinds
        == ["path leads out of the data folder"] * 3
        + ["picture is a folder; expected a plain file"]
        + ["path leads out of the data folder"] * 3
    )


def test_hugging_face_snapshot_links_are_followed(tmp_path: Path) -> None:
    """What huggingface_hub.snapshot_download leaves: links from snapshots/REVISION into blobs."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    (blobs / "123").write_bytes(picture())
    (snapshot / "cat.png").symlink_to("../../blobs/123")
    (snapshot / "cat.txt").write_text("cat")
    assert read(snapshot)[0].read() == picture()


def test_background_reaches_the_pictures(tmp_path: Path) -> None:
    from PIL import Image

    Image.new("RGBA", (4, 4), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    (tmp_path / "clear.txt").write_text("nothing")
    assert np.asarray(read(tmp_path, background="#102030")[0].image())[0, 0].tolist() == [16, 32, 48]


def placed(problems: tuple[Problem, ...], expected: Expected) -> None:
    """Each problem is expected, each expectation met, one to one."""
    left = list(problems)
    for kind, (where, what) in expected.items():
        found = [p for p in left if str(p).startswith(what) and str(p).endswith(where)]
        assert len(found) == 1, f"{kind}: {len(found)} reports {where!r} {what!r} among\n" + "\n".join(map(str, left))
        left.remove(found[0])
    assert not left, "not expected:\n" + "\n".join(map(str, left))


def build_rows(root: Path) -> Expected:
    return build_jsonl(root, root.with_name("outside"))


BAD = [build_rows, build_csv, build_texts, build_shards]


@pytest.mark.parametrize("build", BAD)
def test_each_kind_of_bad_data_gets_its_report(
    build: Callable[[Path], Expected], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = build(tmp_path / "data")
    with pytest.raises(BadDataError) as caught:
        read(tmp_path / "data")
    placed(caught.value.problems, expected)
    message = str(caught.value).splitlines()
    assert message[0] == f"{len(expected)} problems in {tmp_path / 'data'}"
    assert message[1:-1] == [f"  {problem}" for problem in caught.value.problems]
    assert "data.on_bad=skip" in message[-1]

    rows = read(tmp_path / "data", on_bad="skip")
    assert rows.skipped == caught.value.problems
    assert len([row for row in rows if row.captions[0].startswith("good")]) == GOOD
    assert all(np.asarray(row.image()).shape == (32, 40, 3) for row in rows)
    printed = capsys.readouterr().err
    assert f"left out {len(expected)} problems" in printed and all(str(problem) in printed for problem in rows.skipped)


def test_there_are_forty_kinds_in_one_folder_alone(tmp_path: Path) -> None:
    assert len(build_rows(tmp_path / "data")) >= 40


def test_file_names_cannot_break_a_report(tmp_path: Path) -> None:
    name = "a\n\x1b[31m\udcff.png"
    (tmp_path / name).write_bytes(b"")
    (tmp_path / "b.png").write_bytes(picture())
    (tmp_path / "metadata.csv").write_text("file_name,text\nb.png,cat\n")
    with pytest.raises(BadDataError, match=r"no metadata row: .*a\\x0a\\x1b\[31m\\xdcff.png") as caught:
        read(tmp_path)
    assert len(str(caught.value).splitlines()) == 3


def test_report_reads_as_the_house_has_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("data").mkdir()
    Path("data/cat.png").write_bytes(picture())
    Path("data/metadata.jsonl").write_text("\n" * 16 + '{"file_name": "cat.png", "text": " "}')
    with pytest.raises(BadDataError) as caught:
        read("data")
    assert str(caught.value.problems[0]) == "caption is empty: data/metadata.jsonl row 17 (cat.png)"


def write(root: Path, name: str, data: bytes | str = b"") -> None:
    root.mkdir(parents=True, exist_ok=True)
    (root / name).write_bytes(data.encode() if isinstance(data, str) else data)


def structural(root: Path) -> dict[str, tuple[str | Path, str]]:
    """{kind: (source, what its one-line message matches)}."""
    (root / "none").mkdir(parents=True)
    write(root / "column", "metadata.csv", "file_name,caption,n\na.png,cat,1\n")
    write(root / "name", "metadata.jsonl", '{"filename": "a.png", "text": "cat"}')
    write(root / "no_rows", "metadata.jsonl", "\n\n")
    write(root / "header_only", "metadata.csv", "file_name,text\n")
    write(root / "no_header", "metadata.csv")
    write(root / "utf16", "metadata.csv", "file_name,text\n".encode("utf-16"))
    write(root / "columns", "metadata.csv", "file_name,text,text\n")
    write(root / "parquet", "metadata.parquet", b"PAR1 not really")
    write(root / "both", "metadata.csv", "file_name,text\n")
    write(root / "both", "metadata.jsonl", "{}")
    write(root / "file", "cat.png", picture())
    write(root, "packed.tar.gz", b"\x1f\x8b\x08")
    return {
        "folder missing": (root / "nonee", r"folder is missing: .*nonee; the nearest is .*none$"),
        "name without owner": ("pokemons", r"folder is missing: pokemons"),
        "nothing in it": (root / "none", r"no pictures found: .*none; expected pictures with metadata"),
        "caption column": (
            root / "column",
            r"column 'text' is missing: .*metadata.csv has caption, n; the nearest is 'caption': set",
        ),
        "name column": (root / "name", r"column 'file_name' is missing: .*nearest is 'filename': rename it"),
        "no rows": (root / "no_rows", r"metadata has no rows: .*metadata.jsonl"),
        "only a header": (root / "header_only", r"metadata has no rows: .*metadata.csv"),
        "not even a header": (root / "no_header", r"metadata has no rows: .*metadata.csv"),
        "utf-16": (root / "utf16", r"metadata is UTF-16: .*; save it as UTF-8"),
        "column twice": (root / "columns", r"column 'text' appears twice: .*metadata.csv row 1"),
        "no parquet": (root / "parquet", r"metadata is not parquet \("),
        "two metadata files": (root / "both", r"several metadata files in one folder: .*; keep one"),
        "a file": (root / "file" / "cat.png", r"source is a file: .*; expected its folder, .*file$"),
        "no shard": (str(root / "{00..03}.tar"), r"shard is missing: .*00.tar and 3 others"),
        "no match": (str(root / "s*.tar"), r"no shards match: "),
    }


def test_a_source_that_fails_as_a_whole_says_so_in_a_line(tmp_path: Path) -> None:
    for kind, (source, pattern) in structural(tmp_path / "s").items():
        with pytest.raises(BadDataError) as caught:
            read(source)
        assert re.match(pattern, str(caught.value)), f"{kind}: {caught.value}"
        assert len(str(caught.value).splitlines()) == 1 and not caught.value.problems, kind
    with pytest.raises(BadDataError, match=r"unpack \.tar\.gz first"):
        read(str(tmp_path / "s" / "packed.tar.gz"))


def test_bad_rows_of_a_saved_data_set(tmp_path: Path) -> None:
    import datasets

    (tmp_path / "secret.png").write_bytes(picture())
    cells = [
        {"bytes": picture(), "path": None},
        {"bytes": None, "path": str(tmp_path / "secret.png")},
        None,
        {"bytes": picture()[:300], "path": None},
        {"bytes": picture(), "path": None},
    ]
    features = datasets.Features({"image": datasets.Image(decode=False), "text": datasets.Value("string")})
    texts = ["good", "path", "null", "broken", " "]
    data = datasets.Dataset.from_dict({"image": cells, "text": texts}, features)
    root = tmp_path / "set"
    datasets.DatasetDict({"train": data.select([0]), "test": data}).save_to_disk(root)
    assert len(read(root)) == 1
    # save_to_disk embeds what a path names; a crafted file need not
    table = root / "test" / "data-00000-of-00001.arrow"
    with datasets.arrow_writer.ArrowWriter(path=str(table), features=features) as writer:
        writer.write_table(data.data.table)
        writer.finalize()
    with pytest.raises(BadDataError) as caught:
        read(root, hub_split="test")
    placed(
        caught.value.problems,
        {
            "path": ("row 1", "picture is a path that leads out of the data set"),
            "null": ("row 2", "picture is missing"),
            "broken": ("row 3", "picture is broken"),
            "white": ("row 4", "caption is empty"),
        },
    )
    for options, message in (
        ({"hub_split": "tests"}, r"no split 'tests': .* has train, test"),
        ({"image_column": "img"}, r"column 'img' is missing: .*nearest is 'image': set data.image_column"),
        ({"image_column": "text", "caption_columns": ["image"]}, r"column 'text' holds text, not pictures"),
        ({"caption_columns": ["texts"]}, r"column 'texts' is missing: .*nearest is 'text'"),
    ):
        with pytest.raises(BadDataError, match=message):
            read(root, **options)


def test_the_hub_is_announced_before_it_is_asked(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import datasets

    def offline(name: str, config: str | None) -> None:
        assert "reading the data set 'owner/name' of the Hugging Face Hub" in capsys.readouterr().err
        raise ConnectionError("no route\nto the Hub")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(BadDataError, match=r"neither a folder nor a data set .*: owner/name \(no route\)$"):
        read("owner/name")


def test_a_txt_has_no_other_columns(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(PICTURES[0])
    (tmp_path / "a.txt").write_text("cat")
    assert read(tmp_path, caption_columns=("text",))[0].captions == ("cat",)
    with pytest.raises(BadDataError, match=r"column 'title' is missing: a .txt beside a picture, .* has text; the ne"):
        read(tmp_path, caption_columns=("title",))


def test_everything_skipped_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"")
    (tmp_path / "a.txt").write_text("cat")
    with pytest.raises(BadDataError, match="picture is empty"):
        read(tmp_path, on_bad="skip")


def test_unchecked_pictures_name_their_row_when_they_are_read(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.png").write_bytes(b"")
        (tmp_path / f"{name}.txt").write_text("cat")
    rows = read(tmp_path, check=False)
    (tmp_path / "b.png").unlink()
    with pytest.raises(BadDataError, match=r"picture is empty \(0 bytes\): .*a.png"):
        rows[0].image()
    with pytest.raises(BadDataError, match=r"picture is missing: .*b.png"):
        rows[1].read()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"holdout": 1.0}, "holdout is 1.0"),
        ({"holdout": float("nan")}, "holdout is nan"),
        ({"on_bad": "ignore"}, "on_bad is 'ignore'"),
        ({"caption_columns": "text"}, "caption_columns is 'text'"),
        ({"background": "whitish"}, "background is 'whitish'"),
    ],
)
def test_arguments_are_checked_first(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read("nowhere", **options)


def test_rows_stay_small(tmp_path: Path) -> None:
    (tmp_path / "0.png").write_bytes(picture())
    for n in range(1, 3000):
        os.link(tmp_path / "0.png", tmp_path / f"{n}.png")
    lines = [f"{n}.png,caption number {n}\n" for n in range(3000)]
    (tmp_path / "metadata.csv").write_text("file_name,text\n" + "".join(lines))
    rows = read(tmp_path, check=False)
    assert len(rows) == 3000 and rows[2999].captions == ("caption number 2999",)
    where = len(rows[0].where)
    assert len(pickle.dumps(rows)) < 3000 * (where + 100)
    objects = len(gc.get_objects())
    views = [rows.train, rows.heldout, rows[10:]]
    assert len(gc.get_objects()) - objects < 100 and sum(map(len, views)) > 3000
