"""Paths outside the working folder are redacted, and nothing else is changed."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import road

from ldm.sharing.redaction import redact_paths
from ldm.training.config import to_dict

HOME = "/home/ada lovelace/ml"
KNOWN = [f"{HOME}/runs/demo", f"{HOME}/runs/demo/data", "pictures", None]


@pytest.mark.parametrize(
    ("path", "left"),
    [
        (f"{HOME}/runs/demo", "demo"),
        (f"{HOME}/runs/demo/", "demo"),
        (f"{HOME}/runs/demo/pipeline", "demo/pipeline"),
        (f"{HOME}/runs/demo2", "demo2"),
        (f"{HOME}/runs/demo/data/metadata.jsonl row 3 (a b/1.png)", "data/metadata.jsonl row 3 (a b/1.png)"),
        (f"ldm evaluate '{HOME}/runs/demo' --net '{HOME}/a net' --quick", "ldm evaluate 'demo' --net 'a net' --quick"),
        ("ldm evaluate /srv/x --features inception=/srv/w/i.st", "ldm evaluate x --features inception=i.st"),
        ("~/runs/demo", "demo"),
        ("~ada/runs/demo", "demo"),
        ("../../ada/pictures", "pictures"),
        (r"C:\Users\Ada Lovelace\demo", "demo"),
        (r"--net D:\ada\net", "--net net"),
        (r"\\server\ada\demo", "demo"),
    ],
)  # fmt: skip
def test_only_the_last_name_of_a_path_stays(path: str, left: str) -> None:
    assert redact_paths({"a": [path]}, KNOWN) == {"a": [left]}


@pytest.mark.parametrize(
    "text",
    [
        "data/openmoji",
        "stabilityai/sd-vae-ft-mse",
        "https://openmoji.org/library/a.svg",
        "ldm evaluate runs/demo --data data/openmoji --guidance-scale 3.0",
        "average pooling over 4 x 4 pixels, 64 => 16",
        "AMD EPYC / Genoa",
        "Linux-6.18.44-x86_64-with-glibc2.36",
        "2026-11-22T06:35:56Z",
        "a bound on -log density of the VAE's latents; may be negative",
    ],
)
def test_other_text_is_unchanged(text: str) -> None:
    assert redact_paths([text], KNOWN) == [text]


def test_captions_numbers_and_the_input_are_unchanged() -> None:
    tree: Any = {"caption": "/home/ada", "prompts": ["~/x", "w/ garden"], "n": 3, "x": None, "low": 0.5, "ok": True}
    assert redact_paths(tree, KNOWN) == tree
    tree = {"folder": f"{HOME}/runs/demo", "more": [{"a": "/x/y"}]}
    before = copy.deepcopy(tree)
    assert redact_paths(tree, KNOWN) == {"folder": "demo", "more": [{"a": "y"}]}
    assert tree == before


def test_only_the_paths_of_a_config_change(tmp_path: Any) -> None:
    config = to_dict(road.recipe(tmp_path))
    expected = copy.deepcopy(config)
    expected["run"], expected["data"]["source"], expected["text"]["encoder"] = "run", "data", "text"
    assert str(tmp_path) in str(config)
    assert redact_paths(config) == expected
