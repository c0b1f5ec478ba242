"""Number columns: standardized as numpy does it, and every row without a number, by file and row."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
from bad_data import picture

from ldm.data.conditioned import ConditionedPictures
from ldm.data.dataset import BadDataError, CaptionedPictures, read_captioned
from ldm.data.numbers import Numbers
from ldm.training.config import DataConfig


def folder(root: Path, cells: list[dict[str, object]], splits: str = "") -> CaptionedPictures:
    """A row per entry; `splits` says h where a row is held out."""
    lines = []
    for n, cell in enumerate(cells):
        (root / f"{n}.png").write_bytes(picture(seed=n))
        split = "heldout" if splits[n:][:1] == "h" else "train"
        lines.append(json.dumps({"file_name": f"{n}.png", "text": f"caption {n}", "split": split, **cell}))
    (root / "metadata.jsonl").write_text("\n".join(lines))
    return read_captioned(root, progress=False)


def test_the_training_rows_are_standardized_and_the_null_is_no_row(tmp_path: Path) -> None:
    cells = [
        {"size": 1, "angle": "0.5"},
        {"size": 4.0, "angle": -2},
        {"size": 10, "angle": 7},
        {"size": 99, "angle": 1},
    ]
    pictures = folder(tmp_path, [dict(cell) for cell in cells], "---h")
    numbers = Numbers.read(pictures, ["angle", "size"])
    raw = np.array([[float(cell["angle"]), float(cell["size"])] for cell in cells])  # type: ignore[arg-type]
    expected = (raw - raw[:3].mean(0)) / raw[:3].std(0)
    vectors = numbers.vectors(pictures)
    assert vectors.dtype == np.float32 and np.allclose(vectors[:, :2], expected, atol=1e-6)
    assert (vectors[:, 2] == 1).all() and (numbers.null == 0).all() and numbers.width == 3
    assert np.array_equal(numbers.vector({"size": 4, "angle": -2}), vectors[1])
    source = ConditionedPictures.read(pictures, number_columns=["angle", "size"])
    assert np.array_equal(source.train.class_inputs, vectors[:3])  # type: ignore[arg-type]
    numbers.save(tmp_path / "numbers.json")
    assert Numbers.load(tmp_path / "numbers.json") == numbers


def test_rows_without_a_number_are_listed_together(tmp_path: Path) -> None:
    cells: list[object] = [0.5, "big", None, float("nan"), True, "1e3", "", "inf"]
    pictures = folder(tmp_path, [{"size": cell} for cell in cells])
    with pytest.raises(BadDataError) as caught:
        Numbers.read(pictures, ["size"])
    assert [str(problem) for problem in caught.value.problems] == [
        f"size {what}; expected a number: {pictures[n].where}"
        for n, what in (
            (1, "is 'big'"),
            (2, "is empty"),
            (3, "is empty"),
            (4, "is 'True'"),
            (6, "is empty"),
            (7, "is 'inf'"),
        )
    ]


def test_a_column_that_is_missing_or_constant_is_refused(tmp_path: Path) -> None:
    pictures = folder(tmp_path, [{"size": 3}, {"size": 3.0}])
    with pytest.raises(BadDataError, match="size is 3 in all of .*; expected different numbers"):
        Numbers.read(pictures, ["size"])
    with pytest.raises(BadDataError, match="'sise' is missing: .* the nearest is 'size': set data.number_columns"):
        Numbers.read(pictures, ["sise"])


@pytest.mark.parametrize(
    ("given", "error"),
    [
        ({"size": 1, "angel": 2}, "numbers: there is no 'angel'; did you mean 'angle'?"),
        ({"size": 1}, "numbers: expected a number for angle, got None"),
        ({"size": 1, "angle": "wide"}, "numbers: expected a number for angle, got 'wide'"),
        ({"size": 1, "angle": float("inf")}, "numbers: expected a number for angle, got inf"),
    ],
)
def test_what_a_call_can_get_wrong(given: dict[str, object], error: str) -> None:
    with pytest.raises(ValueError) as caught:
        Numbers(("size", "angle"), (0.0, 0.0), (1.0, 1.0)).vector(given)
    assert str(caught.value) == error


def test_numbers_beside_a_class_and_broken_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="data.number_columns: a stock U-Net takes a class or numbers"):
        DataConfig(label_column="kind", number_columns=("size",))
    with pytest.raises(ValueError, match="data.number_columns: a column is named twice: size, size"):
        DataConfig(number_columns=("size", "size"))
    file = tmp_path / "numbers.json"
    for text in (
        "[]",
        "{",
        '{"columns": ["a"], "mean": [0], "std": [0]}',
        '{"columns": ["a"], "mean": [], "std": [1]}',
    ):
        file.write_text(text)
        with pytest.raises(ValueError, match=r"numbers.json holds no numbers"):
            Numbers.load(file)


def test_a_number_far_from_the_training_is_told() -> None:
    numbers = Numbers(("size",), (10.0,), (2.0,))
    with pytest.warns(UserWarning, match="size=30 is 10 standard deviations from the mean of the training, 10"):
        numbers.vector({"size": 30})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        numbers.vector({"size": 20})
