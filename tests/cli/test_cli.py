"""The command line, as a person meets it."""

from __future__ import annotations

import json
import os
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import road
import tiny
from PIL import Image

import ldm
from ldm.cli.main import COMMANDS, main
from ldm.data.cache.store import Kind, to_keys
from ldm.data.cache.writer import Writer
from ldm.data.grid import captioned_grid


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=120, cwd=road.ROOT)


def seconds(statement: str) -> float:
    start = time.perf_counter()
    assert run("-c", statement).returncode == 0
    return time.perf_counter() - start


def test_importing_ldm_costs_nothing() -> None:
    """At most 5 % of importing diffusers, both measured in turns in one run; and no torch behind it."""
    pairs = [(seconds("import ldm"), seconds("import diffusers")) for _ in range(3)]
    ratio = statistics.median(ours / theirs for ours, theirs in pairs)
    print(f"import ldm takes {ratio:.1%} of import diffusers")
    assert ratio <= 0.05
    heavy = "{'torch', 'diffusers', 'transformers', 'numpy', 'accelerate', 'datasets'}"
    assert run("-c", f"import ldm, sys; assert not {heavy} & set(sys.modules)").returncode == 0


def test_ldm_pipeline_is_found_lazily() -> None:
    from ldm.pipelines.text_to_image import LDMPipeline

    assert ldm.LDMPipeline is LDMPipeline
    with pytest.raises(AttributeError, match="no attribute 'Pipeline'"):
        ldm.Pipeline  # noqa: B018


@pytest.mark.parametrize(
    "words", [["--help"], ["data", "openmoji", "--help"], *([name, "--help"] for name in COMMANDS if name != "data")]
)
def test_help_needs_no_torch_and_has_an_example(words: list[str]) -> None:
    told = f"import sys; sys.argv = ['ldm', *{words!r}]\nfrom ldm.cli.main import main\ntry: main()\nfinally: "
    done = run("-c", told + "assert not {'torch', 'diffusers', 'transformers', 'gradio'} & set(sys.modules)")
    assert done.returncode == 0, done.stderr
    assert len(words) == 1 or re.search(r"\nexamples?:\n  ldm ", done.stdout)


def test_sample_draws_a_grid_that_depends_on_the_seed(tiny_pipeline_folder: Path, tmp_path: Path) -> None:
    words = ["sample", str(tiny_pipeline_folder), "red heart", "cat", "blue flag", "--steps", "2"]
    for name, seed in {"a": "3", "again": "3", "other": "4"}.items():
        main([*words, "--seed", seed, "--out", str(tmp_path / "new" / f"{name}.png")])
    grids = {name: (tmp_path / "new" / f"{name}.png").read_bytes() for name in ("a", "again", "other")}
    assert grids["a"] == grids["again"] != grids["other"]
    assert Image.open(tmp_path / "new/a.png").width > 3 * 128


def test_no_picture_is_shrunk_for_a_grid(tiny_pipeline_folder: Path, tmp_path: Path) -> None:
    """A grid of large pictures is as large as they are, and small ones are enlarged."""
    for edge, shown in ((160, 160), (16, 128)):
        size = ["--width", str(edge), "--height", str(edge), "--steps", "1", "--out", str(tmp_path / "grid.png")]
        main(["sample", str(tiny_pipeline_folder), "red", "blue", *size])
        assert 2 * shown < Image.open(tmp_path / "grid.png").width < 2.5 * shown


def test_sample_asks_a_model_for_what_it_knows(tmp_path: Path) -> None:
    """Classes, one picture each; without any, the null class; a prompt is refused."""
    pipe = tiny.class_pipeline(tmp_path, ("food", "flags"))
    pipe.save_pretrained(tmp_path / "model")
    words = ["sample", str(tmp_path / "model"), "--dtype", "float32", "--steps", "2", "--seed", "5", "--columns", "2"]
    main([*words, "--out", str(tmp_path / "classes.png"), "--class-label", "flags", "food"])
    drawn = pipe(class_label=["flags", "food"], num_inference_steps=2, seed=5).images
    expected = captioned_grid(drawn, ["flags", "food"], columns=2)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "classes.png")), np.asarray(expected))
    main([*words, "--out", str(tmp_path / "any.png"), "--images-per-prompt", "2"])
    drawn = pipe(num_images_per_prompt=2, num_inference_steps=2, seed=5).images
    expected = captioned_grid(drawn, ["", ""], columns=2)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "any.png")), np.asarray(expected))
    with pytest.raises(SystemExit, match="error: prompt: this model knows no text"):
        main([*words, "pizza"])


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["sample", "no/such/folder", "red"], "no/such/folder: there is no such folder"),
        (["sample", "{folder}", "red", "--steps", "0"], "num_inference_steps: expected a whole number from 1"),
        (["data", "check", "no-such-folder"], "no-such-folder"),
    ],
)
def test_errors_are_one_line(
    words: list[str], told: str, tiny_pipeline_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([word.format(folder=tiny_pipeline_folder) for word in words])
    assert told in str(stopped.value)
    assert str(stopped.value).startswith("error: ")


def test_check_reports_every_bad_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = road.draw_folder(tmp_path / "data")
    main(["data", "check", str(folder)])
    assert "is fine: 24 pictures, 24 different captions" in capsys.readouterr().out
    os.remove(folder / "images/red_heart.png")
    (folder / "images/blue_cat.png").write_bytes(b"not a picture")
    with pytest.raises(SystemExit) as stopped:
        main(["data", "check", str(folder)])
    assert "red_heart.png" in str(stopped.value) and "blue_cat.png" in str(stopped.value)


def test_check_reads_classes_second_pictures_and_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = road.draw_folder(tmp_path / "data")
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    for i, row in enumerate(rows):
        row |= {"size": i}
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["--label-column", "color", "--number-columns", "size", "--condition-column", "outline"]
    main(["data", "check", str(folder), *words])
    assert "is fine" in capsys.readouterr().out
    rows[3] |= {"size": "big", "outline": "none.png"}
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for option, column, told in (
        ("number", "size", "size is 'big'"),
        ("condition", "outline", "outline: picture is missing: .* row 4"),
    ):
        with pytest.raises(SystemExit, match=told):
            main(["data", "check", str(folder), f"--{option}-column{'s' * (option == 'number')}", column])


def test_check_warns_of_pictures_that_are_too_small(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("RGB", (1, 1)).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("dot")
    main(["data", "check", str(tmp_path), "--size", "32"])
    printed = capsys.readouterr().out
    assert "warning: 1 picture enlarged to 32 x 32:\n  enlarged from 1 x 1" in printed and "is fine" in printed


def test_check_fails_if_every_picture_is_held_out(tmp_path: Path) -> None:
    for n in range(8):
        Image.new("RGB", (4, 4), (n, 0, 0)).save(tmp_path / f"{n}.png")
        (tmp_path / f"{n}.txt").write_text("face")
    with pytest.raises(SystemExit, match=r"error: no pictures to train on: all 8 .*lower data\.holdout"):
        main(["data", "check", str(tmp_path)])


def test_cache_is_listed_and_every_record_is_checked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kind = Kind("posteriors", {"vae": "abc", "size": 64}, "<f4", (3,))
    payloads = np.arange(6, dtype=np.float32).reshape(2, 3)
    for number in (1, 2):
        with Writer(tmp_path / f"store-{number}.sqlite", kind) as writer:
            writer.append(to_keys(b"a" * 16 + b"b" * 16), payloads)
    main(["data", "cache", str(tmp_path)])
    assert capsys.readouterr().out.splitlines() == [
        f"store-{number}: 2 records, 0.0 MiB, all whole; size 64, vae abc" for number in (1, 2)
    ]
    file = tmp_path / "store-2.sqlite"
    data = bytearray(file.read_bytes())
    data[data.index(payloads[1].tobytes())] ^= 4
    file.write_bytes(data)
    for said in (
        "store-2: 2 records, 0.0 MiB, 1 record damaged; size 64, vae abc",
        "store-2: 0.0 MiB; store-2.sqlite: a record",
    ):
        with pytest.raises(SystemExit, match="encodes anew what is damaged"):
            main(["data", "cache", str(tmp_path)])
        out = capsys.readouterr().out
        assert said in out and "store-1: 2 records, 0.0 MiB, all whole" in out
    with pytest.raises(SystemExit, match="holds no cache; expected RUN/cache"):
        main(["data", "cache", str(tmp_path / "store-1")])


def test_an_unknown_option_is_answered_by_its_own_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["sample", "models/emoji", "cat", "--stepz", "3"])
    said = capsys.readouterr().err
    assert said.startswith("usage: ldm sample [OPTION ...] MODEL")
    assert "ldm sample: error: unrecognized arguments: --stepz 3; did you mean --steps?" in said
