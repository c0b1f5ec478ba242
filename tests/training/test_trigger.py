"""The words that call a LoRA: found in its captions, or named and checked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import road

from ldm.data.dataset import CaptionedPictures, read_captioned
from ldm.training.trigger import find_trigger, plain_captions, trigger_of, without


@pytest.mark.parametrize(
    ("captions", "trigger"),
    [
        (["cat, noto style", "red cat, noto style"], "cat, noto style"),
        (["rocket, Night style", "pear, night style."], "Night style"),
        (["night sky, night style", "night train, night style", "pear, night style"], "night style"),
        (["an ink style drawing of a cat", "an ink style drawing of the sea"], "an ink style drawing of"),
        (["a cat on the mat", "a dog on the mat in rain"], "on the mat"),
        (["a cat", "a dog"], ""),  # of which no caption is free
        (["red heart", "pizza"], ""),
        ([], ""),
    ],
)
def test_the_longest_phrase_that_all_captions_have(captions: list[str], trigger: str) -> None:
    assert find_trigger(captions) == trigger


def test_captions_without_it() -> None:
    assert without("a red heart, ink style", "ink style") == "a red heart" == without("ink: a red heart", "ink")
    assert without("night sky, Night style", "night style") == "night sky"
    assert without("a cat, ink style, on a mat", "ink style") == "a cat, on a mat"
    assert without("a style of ink", "ink style") == "a style of ink"


def pictures(folder: Path, captions: list[str]) -> CaptionedPictures:
    road.draw_folder(folder)
    metadata = folder / "metadata.jsonl"
    rows = [json.loads(line) for line in metadata.read_text().splitlines()]
    texts = [captions[i % len(captions)] for i in range(len(rows))]
    metadata.write_text("".join(json.dumps(row | {"text": text}) + "\n" for row, text in zip(rows, texts, strict=True)))
    return read_captioned(folder, progress=False)


def test_a_caption_without_it_is_named_with_its_row(tmp_path: Path) -> None:
    found = pictures(tmp_path / "a", ["rocket, night style", "pear, night style", "plum", "apple, night style"])
    expected = r'^lora.trigger: 1 of 4 captions has no "night style", .*; the first: .*metadata.jsonl row 3.*: "plum"$'
    for given in (None, "night style"):
        with pytest.raises(ValueError, match=expected):
            trigger_of(found, given)
    with pytest.raises(ValueError, match=r'^lora.trigger: 4 of 4 captions have no "ink"'):
        trigger_of(found, "ink")
    with pytest.raises(ValueError, match=r"^lora.trigger: the captions of .* have no words in common"):
        trigger_of(pictures(tmp_path / "b", ["a rocket", "a pear", "a plum"]), None)


def test_words_that_are_the_whole_caption_leave_nothing(tmp_path: Path) -> None:
    found = pictures(tmp_path / "a", ["a photo of sks dog"])
    trigger = trigger_of(found, None)
    with pytest.raises(ValueError, match=r'^lora.trigger: nothing is left of .*, "a photo of sks dog"; name'):
        plain_captions(found, trigger)
    assert plain_captions(found, trigger_of(found, "sks")) == ["a photo of dog"]
