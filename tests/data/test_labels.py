"""Labels: a stable order, ids that are where the rows are, and every row that has none, by file and row."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from bad_data import picture

from ldm.data.dataset import BadDataError, CaptionedPictures, read_captioned
from ldm.data.labels import Labels, label_of


def folder(root: Path, cells: list[object], splits: str = "", column: str = "group") -> CaptionedPictures:
    """A row per cell, `...` for a row without the column; `splits` says h where a row is held out."""
    root.mkdir(exist_ok=True)
    lines = []
    for n, cell in enumerate(cells):
        (root / f"{n}.png").write_bytes(picture(seed=n))
        row = {
            "file_name": f"{n}.png",
            "text": f"caption {n}",
            "split": "heldout" if splits[n:][:1] == "h" else "train",
        }
        lines.append(json.dumps(row if cell is ... else {**row, column: cell}))
    (root / "metadata.jsonl").write_text("\n".join(lines))
    return read_captioned(root, progress=False)


def test_ids_follow_the_rows_of_every_view(tmp_path: Path) -> None:
    cells = ["pear", "apple", "fig", "pear", "apple", "fig"]
    pictures = folder(tmp_path, list(cells), "---hhh")
    labels = Labels.read(pictures, "group")
    assert labels.names == ("apple", "fig", "pear")
    for view in (pictures, pictures.train, pictures.heldout, pictures.select([4, 0, 2])):
        ids = labels.ids(view)
        assert ids.dtype == np.int64
        assert [labels.names[i] for i in ids] == [row.extra["group"] for row in view]
    assert labels.id("fig") == 1


def test_order_depends_on_the_names_alone(tmp_path: Path) -> None:
    """Not on the order of rows; and 10 comes after 9."""
    assert Labels.read(folder(tmp_path / "a", [10, 9, 0, -1, 9]), "group").names == ("-1", "0", "9", "10")
    assert Labels.read(folder(tmp_path / "b", ["0", 9.0, -1.0, " 10 "]), "group").names == ("-1", "0", "9", "10")
    mixed = Labels.read(folder(tmp_path / "c", ["b", 2, True, "é", 1.5]), "group")
    assert mixed.names == ("2", "1.5", "b", "true", "é")
    assert label_of(float("nan")) is None


def test_a_missing_column_names_the_nearest(tmp_path: Path) -> None:
    pictures = folder(tmp_path, ["a", "b"], column="groups")
    with pytest.raises(BadDataError, match=r"column 'group' is missing: .* has groups; the nearest is 'groups'"):
        Labels.read(pictures, "group")


def test_rows_without_a_label_are_listed_together(tmp_path: Path) -> None:
    """With rows that no training can prepare for; each by file and row, and no advice that wouldn't help."""
    pictures = folder(tmp_path, ["a", ..., "", None, "b", "new", "a", "new too"], "-----hhh")
    with pytest.raises(BadDataError) as error:
        Labels.read(pictures, "group")
    found = {(problem.where.split()[-2], problem.what) for problem in error.value.problems}
    assert found == {
        ("2", "group is empty"),
        ("3", "group is empty"),
        ("4", "group is empty"),
        ("6", "group is 'new', which no training row has"),
        ("8", "group is 'new too', which no training row has"),
    }
    assert "metadata.jsonl row 6 (5.png)" in str(error.value)
    assert "data.label_column" in str(error.value) and "on_bad" not in str(error.value)


def test_one_label_is_none(tmp_path: Path) -> None:
    with pytest.raises(BadDataError, match="group is 'a' in all of"):
        Labels.read(folder(tmp_path, ["a", "a"]), "group")


def test_saved_labels_are_the_same_and_refuse_strangers(tmp_path: Path) -> None:
    labels = Labels.read(folder(tmp_path / "one", ["naïve", "b"]), "group")
    labels.save(tmp_path / "labels.json")
    again = Labels.load(tmp_path / "labels.json")
    assert again == labels
    with pytest.raises(BadDataError, match=r"group is 'c', which is not among the known labels: .* row 2 \(1.png\)"):
        again.ids(folder(tmp_path / "other", ["b", "c"]))
    with pytest.raises(ValueError, match="there is no 'naive'; did you mean 'naïve'"):
        again.id("naive")
    (tmp_path / "labels.json").write_text('{"names": "ab"}')
    with pytest.raises(ValueError, match="holds no labels"):
        Labels.load(tmp_path / "labels.json")
