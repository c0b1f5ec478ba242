"""`ldm sample`: every option is obeyed or refused by name, and nothing fails after the pictures are made."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

from ldm import LDMPipeline
from ldm.cli.main import main
from ldm.data.grid import captioned_grid
from ldm.data.images import decode
from ldm.sharing import png_metadata

FLOAT = ("--dtype", "float32")


@pytest.fixture(scope="module")
def model(tiny_pipeline_folder: Path) -> str:
    return str(tiny_pipeline_folder)


@pytest.fixture(scope="module")
def pipe(model: str) -> LDMPipeline:
    pipe = LDMPipeline.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def heart(model: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The second of three pictures of a batch."""
    folder = tmp_path_factory.mktemp("heart")
    words = ["--steps", "3", "--guidance-scale", "4", "--seed", "7", "--images-per-prompt", "3"]
    main(["sample", model, "red heart", *FLOAT, *words, "--each", str(folder)])
    return folder / "00008-red-heart.png"


def refusal(*words: str) -> str:
    """The error of a command line, of either exit status, in one line."""
    with pytest.raises(SystemExit) as stopped:
        main(["sample", *words])
    return str(stopped.value.code)


# --- --like --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "changed"),
    [
        (["--seed", "9"], {"seed": 9}),
        (["--steps", "4"], {"num_inference_steps": 4}),
        (["--guidance-scale", "2"], {"guidance_scale": 2.0}),
        (["--guidance-interval", "0.2", "0.9"], {"guidance_interval": (0.2, 0.9)}),
        (["--negative-prompt", "blue"], {"negative_prompt": "blue"}),
        (["--sampler", "ddim"], {"sampler": "ddim"}),
    ],
)
def test_options_beside_like_are_obeyed(
    words: list[str],
    changed: dict[str, Any],
    heart: Path,
    model: str,
    pipe: LDMPipeline,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    main(["sample", model, "--like", str(heart), *words, "--out", str(tmp_path / "other.png")])
    settings = {"num_inference_steps": 3, "guidance_scale": 4.0, "guidance_interval": (0.0, 1.0), "seed": 8}
    (expected,) = pipe("red heart", **{**settings, **changed}).images
    with Image.open(tmp_path / "other.png") as made, Image.open(heart) as before:
        assert np.array_equal(np.asarray(made), np.asarray(expected))
        assert not np.array_equal(np.asarray(made), np.asarray(before))
    name = {"num_inference_steps": "steps"}.get(next(iter(changed)), next(iter(changed)))
    said = capsys.readouterr().out
    assert "it is not the same file:" in said and f"\n  {name}: " in said
    main(["sample", model, "--like", str(tmp_path / "other.png"), "--out", str(tmp_path / "again.png")])
    assert "the same picture, byte for byte" in capsys.readouterr().out


def test_options_that_change_nothing_leave_the_picture_as_it_is(heart: Path, model: str, tmp_path: Path) -> None:
    words = ["--seed", "8", "--steps", "3", "--guidance-scale", "4", "--engine", "torch"]
    main(["sample", model, "--like", str(heart), *words, "--out", str(tmp_path / "again.png")])
    assert (tmp_path / "again.png").read_bytes() == heart.read_bytes()


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--each", "folder"], "--each"),
        (["--images-per-prompt", "2"], "--images-per-prompt"),
        (["--columns", "2"], "--columns"),
        (["--batch-size", "2"], "--batch-size"),
        (["--dtype", "float32"], "--dtype"),
        (["--class-label", "a", "b"], "--class-label"),
        (["--classifier-scale", "2"], "--classifier-scale"),
        (["another prompt"], "prompts"),
    ],
)
def test_what_like_cannot_obey_is_refused_by_name(
    words: list[str], named: str, heart: Path, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(LDMPipeline, "from_pretrained", lambda *_, **__: pytest.fail("a network was loaded"))
    assert refusal(model, "--like", str(heart), *words).startswith(f"error: {named}: ")


# --- files ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("out", "kind", "largest"),
    [("a.png", "PNG", 0), ("a.JPG", "JPEG", 40), ("a.jpeg", "JPEG", 40), ("a.webp", "WEBP", 0)],
)
def test_the_suffix_is_the_format(
    out: str, kind: str, largest: int, model: str, pipe: LDMPipeline, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "new folder" / out
    main(["sample", model, "red heart", *FLOAT, "--steps", "2", "--guidance-scale", "3", "--out", str(file)])
    (expected,) = pipe("red heart", num_inference_steps=2, guidance_scale=3.0, guidance_interval=(0, 1), seed=0).images
    with Image.open(file) as made:
        assert made.format == kind
        difference = np.abs(np.asarray(made).astype(int) - np.asarray(expected))
        assert (png_metadata.KEY in made.info) == (kind == "PNG")
    assert difference.mean() <= largest
    assert ("its settings are not: only PNG files hold them" in capsys.readouterr().out) == (kind != "PNG")
    main(["sample", model, "red heart", "cat", *FLOAT, "--steps", "1", "--out", str(file)])
    with Image.open(file) as made:
        assert made.format == kind and made.width > 2 * 128


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--out", "grid"], "grid: expected a file that ends in .png, .jpg, .jpeg, .webp"),
        (["--out", "one.gif"], "one.gif: expected a file that ends in .png"),
        (["--out", "new/"], "new/ is a folder; expected a file that ends in .png"),
        (["--out", "there.png"], "there.png is a folder; expected a file"),
        (["--each", "file.txt"], "file.txt is a file; expected a folder"),
        (["--out", "file.txt/a.png"], "file.txt"),
        (["--columns", "0"], "--columns: expected a whole number of at least 1, got '0'"),
        (["--images-per-prompt", "-1"], "--images-per-prompt: expected a whole number of at least 1"),
        (["--batch-size", "0"], "--batch-size: expected a whole number of at least 1"),
        (["--classifier-scale", "2"], "--classifier-scale: there is no --classifier to scale"),
    ],
)
def test_what_cannot_be_written_is_an_error_before_a_network_is_loaded(
    words: list[str], message: str, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(LDMPipeline, "from_pretrained", lambda *_, **__: pytest.fail("a network was loaded"))
    (tmp_path / "there.png").mkdir()
    (tmp_path / "file.txt").write_text("text")
    said = refusal(model, "cat", *words) + capsys.readouterr().err
    assert message in said
    assert not (tmp_path / "new").exists()


# --- batches -------------------------------------------------------------------------------------------

PROMPTS = ["red heart", "cat", "blue flag", "pizza", "house with garden"]


@pytest.mark.parametrize(("size", "count", "largest"), [(2, 1, 2), (4, 3, 3), (2, 5, 2), (16, 2, 10)])
def test_many_prompts_are_generated_in_batches(
    size: int, count: int, largest: int, model: str, pipe: LDMPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No batch is larger than it may be, and each of its pictures is the one of its seed, bit for bit."""
    calls: list[tuple[int, Any]] = []
    whole = LDMPipeline.__call__

    def counted(self: LDMPipeline, *args: Any, **arguments: Any) -> Any:
        made = whole(self, *args, **arguments)
        calls.append((len(made.images), arguments["seed"]))
        return made

    monkeypatch.setattr(LDMPipeline, "__call__", counted)
    settings = ["--steps", "2", "--guidance-scale", "3", "--seed", "11"]
    words = [*settings, "--images-per-prompt", str(count), "--batch-size", str(size)]
    main(["sample", model, *PROMPTS, *FLOAT, *words, "--out", str(tmp_path / "grid.png")])
    monkeypatch.undo()
    assert max(pictures for pictures, _ in calls) == largest <= max(size, 1)
    assert sum(pictures for pictures, _ in calls) == len(PROMPTS) * count
    assert [seed for _, seed in calls] == [11 + sum(pictures for pictures, _ in calls[:i]) for i in range(len(calls))]
    each = [prompt for prompt in PROMPTS for _ in range(count)]
    expected, done = [], 0
    for pictures, seed in calls:
        part = each[done : done + pictures]
        expected += pipe(part, num_inference_steps=2, guidance_scale=3.0, guidance_interval=(0, 1), seed=seed).images
        done += pictures
    with Image.open(tmp_path / "grid.png") as made:
        assert np.array_equal(np.asarray(made), np.asarray(captioned_grid(expected, each)))


def test_settings_of_a_large_batch_in_parts_generate_each_file_again(model: str, tmp_path: Path) -> None:
    words = ["--steps", "2", "--images-per-prompt", "5", "--batch-size", "2", "--each", str(tmp_path / "each")]
    main(["sample", model, "cat", *FLOAT, *words])
    files = sorted((tmp_path / "each").iterdir())
    assert [file.name for file in files] == [f"{seed:05d}-cat.png" for seed in range(5)]
    for file in files:
        main(["sample", model, "--like", str(file), "--out", str(tmp_path / "again.png")])
        assert (tmp_path / "again.png").read_bytes() == file.read_bytes()


# --- the second picture --------------------------------------------------------------------------------


def test_the_second_picture_is_decoded_as_in_training(tmp_path: Path) -> None:
    """Transparent pixels are white, and a picture that a camera turned is upright."""
    pipe = tiny.condition_pipeline(tmp_path / "text")
    pipe.save_pretrained(tmp_path / "model")
    stored = Image.new("RGBA", (16, 16), (200, 40, 40, 255))
    stored.paste((0, 0, 0, 0), (0, 0, 16, 5))  # black where it is transparent
    turned = Image.Exif()
    turned[0x0112] = 6  # stored lying on its left side
    buffer = io.BytesIO()
    stored.save(buffer, "PNG", exif=turned)
    (tmp_path / "second.png").write_bytes(buffer.getvalue())
    upright = decode(buffer.getvalue())
    assert np.asarray(upright)[0, -1].tolist() == [255, 255, 255] and np.asarray(upright)[0, 0].tolist() == [
        200,
        40,
        40,
    ]

    settings = ["--steps", "2", "--guidance-scale", "3", "--seed", "4"]
    words = ["red heart", "--condition", str(tmp_path / "second.png"), *FLOAT, *settings]
    main(["sample", str(tmp_path / "model"), *words, "--out", str(tmp_path / "made.png")])
    arguments: Any = {"num_inference_steps": 2, "guidance_scale": 3.0, "guidance_interval": (0, 1), "seed": 4}
    (expected,) = pipe("red heart", condition=upright, **arguments).images
    (otherwise,) = pipe("red heart", condition=stored.convert("RGB"), **arguments).images
    with Image.open(tmp_path / "made.png") as made:
        assert np.array_equal(np.asarray(made), np.asarray(expected))
        assert not np.array_equal(np.asarray(made), np.asarray(otherwise))

    again = ["--like", str(tmp_path / "made.png"), str(tmp_path / "model"), "--out", str(tmp_path / "again.png")]
    assert "name that with --condition" in refusal(*again)
    main(["sample", *again, "--condition", str(tmp_path / "second.png")])
    assert (tmp_path / "again.png").read_bytes() == (tmp_path / "made.png").read_bytes()


# --- settings ------------------------------------------------------------------------------------------


def test_the_file_holds_what_the_call_resolved_to(model: str, tmp_path: Path) -> None:
    """The model's defaults if no setting was named; with one named, the others are those of stock diffusers."""
    pipe = LDMPipeline.from_pretrained(model)
    pipe.defaults = type(pipe.defaults)(5, 2.0, (0.1, 0.9))
    pipe.save_pretrained(tmp_path / "model")
    main(["sample", str(tmp_path / "model"), "cat", *FLOAT, "--out", str(tmp_path / "a.png")])
    found = png_metadata.read(tmp_path / "a.png")
    assert (found.steps, found.guidance_scale, found.guidance_interval) == (5, 2.0, [0.1, 0.9])
    pipe.set_progress_bar_config(disable=True)
    (expected,) = pipe("cat", seed=0).images
    with Image.open(tmp_path / "a.png") as made, torch.no_grad():
        assert np.array_equal(np.asarray(made), np.asarray(expected))
    main(["sample", str(tmp_path / "model"), "cat", *FLOAT, "--steps", "3", "--out", str(tmp_path / "a.png")])
    found = png_metadata.read(tmp_path / "a.png")
    assert (found.steps, found.guidance_scale, found.guidance_interval, found.sampler) == (3, 7.5, None, None)


@pytest.mark.parametrize(("name", "kind"), [("ddim", "DDIMScheduler"), ("heun", "HeunDiscreteScheduler")])
def test_a_sampler_by_name(name: str, kind: str, model: str, pipe: LDMPipeline, tmp_path: Path) -> None:
    words = ["--steps", "4", "--guidance-scale", "2", "--seed", "3", "--sampler", name]
    main(["sample", model, "cat", *FLOAT, *words, "--out", str(tmp_path / "a.png")])
    found = png_metadata.read(tmp_path / "a.png")
    assert (found.sampler, found.scheduler) == (name, kind)
    (expected,) = pipe("cat", num_inference_steps=4, guidance_scale=2.0, seed=3, sampler=name).images
    with Image.open(tmp_path / "a.png") as made:
        assert np.array_equal(np.asarray(made), np.asarray(expected))
    main(["sample", model, "--like", str(tmp_path / "a.png"), "--out", str(tmp_path / "again.png")])
    assert (tmp_path / "again.png").read_bytes() == (tmp_path / "a.png").read_bytes()
