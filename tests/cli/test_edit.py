"""`ldm edit` and `ldm walk`: the pipeline's pictures, with settings that don't claim too much."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageSequence

from ldm import LDMPipeline
from ldm.cli.main import main
from ldm.data.grid import captioned_grid
from ldm.pipelines.walks import walk
from ldm.sharing import png_metadata

STEPS = ("--dtype", "float32", "--steps", "4", "--guidance-scale", "3")
WORDS: dict[str, Any] = {"num_inference_steps": 4, "guidance_scale": 3.0}


@pytest.fixture(scope="module")
def model(tiny_pipeline_folder: Path) -> str:
    return str(tiny_pipeline_folder)


@pytest.fixture(scope="module")
def pipe(model: str) -> LDMPipeline:
    pipe = LDMPipeline.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, with a picture, a larger one with transparency, and their masks."""
    monkeypatch.chdir(tmp_path)
    pixels = np.random.default_rng(0).integers(0, 256, (4, 4, 4), dtype=np.uint8)
    large = Image.fromarray(pixels).resize((48, 32), Image.Resampling.BICUBIC)
    large.save("large.png")
    large.convert("RGB").resize((16, 16)).save("small.png")
    for name, size in (("mask", (16, 16)), ("large-mask", (48, 32))):
        mask = Image.new("L", size)
        mask.paste(255, (size[0] // 2, 0, *size))
        mask.save(f"{name}.png")
    return tmp_path


def opened(file: str) -> Any:
    with Image.open(file) as picture:
        picture.load()
        return picture


def refusal(*words: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        main(list(words))
    return str(stopped.value.code)


@pytest.mark.parametrize(
    ("words", "arguments"),
    [
        ([], {}),
        (["--strength", "0.5", "--sampler", "ddim"], {"strength": 0.5, "sampler": "ddim"}),
        (["--mask", "mask.png"], {"mask_image": "mask.png"}),
        (["--expand", "right=8, top=4"], {"expand": (0, 4, 8, 0)}),
    ],
)
def test_an_edit_is_the_pipeline_s(
    words: list[str], arguments: dict[str, Any], home: Path, model: str, pipe: LDMPipeline
) -> None:
    main(["edit", model, "small.png", "cat", *STEPS, "--seed", "5", *words])
    if "mask_image" in arguments:
        arguments = {"mask_image": opened("mask.png")}
    (expected,) = pipe("cat", image=opened("small.png"), seed=5, **WORDS, **arguments).images
    assert np.array_equal(np.asarray(opened("edited.png")), np.asarray(expected))


def test_a_file_names_its_source_and_does_not_claim_to_be_repeatable(home: Path, model: str) -> None:
    main(["edit", model, "small.png", "cat", *STEPS, "--mask", "mask.png", "--expand", "left=8"])
    found = png_metadata.read(Path("edited.png"))
    source, mask = (png_metadata.picture_sha256(opened(file)) for file in ("small.png", "mask.png"))
    assert (found.image, found.mask, found.strength, found.expand) == (source, mask, 1.0, [8, 0, 0, 0])
    assert (found.width, found.height, found.prompt, found.steps) == (24, 16, "cat", 4)
    said = refusal("sample", model, "--like", "edited.png")
    assert said.startswith("error: edited.png: it is an edit of a picture that the file does not hold (SHA-256 ")
    assert source[:12] in said and "\n" not in said
    main(["edit", model, "small.png", "cat", *STEPS, "--strength", "0.5"])
    found = png_metadata.read(Path("edited.png"))
    assert (found.strength, found.mask, found.expand) == (0.5, None, None)


def test_a_picture_of_another_size_is_resized_with_its_mask_and_a_message(
    home: Path, model: str, pipe: LDMPipeline, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["edit", model, "large.png", "cat", *STEPS, "--mask", "large-mask.png"])
    assert "large.png: resized from 48 x 32 to 24 x 16; --edge chooses another size" in capsys.readouterr().out
    white = Image.alpha_composite(Image.new("RGBA", (48, 32), "white"), opened("large.png")).convert("RGB")
    source, mask = (one.resize((24, 16), Image.Resampling.LANCZOS) for one in (white, opened("large-mask.png")))
    (expected,) = pipe("cat", image=source, mask_image=mask, seed=0, **WORDS).images
    assert np.array_equal(np.asarray(opened("edited.png")), np.asarray(expected))
    assert np.array_equal(np.asarray(opened("edited.png"))[:, :12], np.asarray(source)[:, :12])
    assert png_metadata.read(Path("edited.png")).image == png_metadata.picture_sha256(white)
    main(["edit", model, "large.png", "cat", *STEPS, "--edge", "32"])
    assert opened("edited.png").size == (48, 32) and "resized" not in capsys.readouterr().out


def test_variations_are_of_seeds_that_count_up(home: Path, model: str, pipe: LDMPipeline) -> None:
    words = ["--variations", "3", "--batch-size", "2", "--seed", "7", "--strength", "0.5"]
    main(["edit", model, "small.png", "cat", *STEPS, *words, "--each", "each", "--out", "grid.png"])
    files = sorted(Path("each").iterdir())
    assert [file.name for file in files] == [f"{seed:05d}-cat.png" for seed in (7, 8, 9)]
    made = [opened(str(file)) for file in files]
    for picture, seed in zip(made, (7, 8, 9), strict=True):
        (alone,) = pipe("cat", image=opened("small.png"), seed=seed, strength=0.5, **WORDS).images
        assert np.abs(np.asarray(picture).astype(int) - np.asarray(alone)).max() <= 1
    captions = ["small.png", "seed 7", "seed 8", "seed 9"]
    grid = captioned_grid([opened("small.png"), *made], captions)
    assert np.array_equal(np.asarray(opened("grid.png")), np.asarray(grid))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["none.png", "cat"], "none.png"),
        (["text.png", "cat"], "text.png: picture is of an unknown kind"),
        (["small.png", "cat", "--mask", "large-mask.png"], "large-mask.png: expected the size of small.png, 16 x 16"),
        (
            ["small.png", "cat", "--expand", "left=8,up=4"],
            "argument --expand: expected pixels by side, such as left=32",
        ),
        (["small.png", "cat", "--expand", "left=8,left=4"], "argument --expand: expected pixels by side"),
        (["small.png", "cat", "--out", "a.gif"], "a.gif: expected a file that ends in .png"),
    ],
)
def test_what_cannot_be_edited_is_an_error_before_a_network_is_loaded(
    words: list[str], message: str, home: Path, model: str, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(LDMPipeline, "from_pretrained", lambda *_, **__: pytest.fail("a network was loaded"))
    Path("text.png").write_text("hello")
    assert message in refusal("edit", model, *words) + capsys.readouterr().err


def test_a_walk_is_a_strip_or_an_animation(home: Path, model: str, pipe: LDMPipeline) -> None:
    pictures = walk(pipe, ["cat", "pizza"], [2, 3], 5, batch_size=2, **WORDS)
    words = ["cat", "pizza", *STEPS, "--seeds", "2", "3", "--frames", "5", "--batch-size", "2"]
    main(["walk", model, *words, "--out", "walk.png"])
    assert np.array_equal(np.asarray(opened("walk.png")), np.concatenate([np.asarray(p) for p in pictures], 1))
    main(["walk", model, *words, "--fps", "4"])
    with Image.open("walk.gif") as found:
        assert found.info["duration"] == 250
        assert len(list(ImageSequence.Iterator(found))) == 5
    assert "walk.txt: expected a file that ends in .gif, .mp4, .png" in _usage(
        ["walk", model, *words, "--out", "walk.txt"]
    )
    assert "prompts: expected two prompts or two seeds" in refusal("walk", model, "cat")


def _usage(words: list[str]) -> str:
    import contextlib
    import io

    with contextlib.redirect_stderr(io.StringIO()) as said, pytest.raises(SystemExit):
        main(words)
    return said.getvalue()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["small.png", "nothere.png"], "error: nothere.png: expected a picture, got no such file; the order is MODEL "),
        (["small.png", "."], "error: .: expected a picture, got a folder; the order is MODEL PICTURE PROMPT"),
        (["MODEL", "small.png"], "error: PROMPT: this model generates from text"),
        (["MODEL", "small.png", "x", "--steps", "0"], "error: num_inference_steps: expected a whole number from 1 to"),
        (["MODEL", "small.png", "x", "--out", "small.png"], "error: --out small.png: is what the result is made of"),
        (["MODEL", "small.png", "x", "--mask", "mask.png", "--out", "./mask.png"], "error: --out mask.png: is what"),
        (["MODEL", "small.png", "x", "--edge", "100000"], "error: --edge: expected edges from 4 to 4096 pixels, got "),
        (
            ["MODEL", "small.png", "x", "--out", "small.png/x.png"],
            "error: small.png: can't be written to (Not a directory)",
        ),
        (["MODEL", "small.png", "x", "--lora", "nothere"], "error: nothere: there is no such folder or file"),
    ],
)
def test_a_mistake_is_one_line_before_anything_is_written(
    words: list[str], message: str, home: Path, model: str
) -> None:
    before = sorted(home.iterdir())
    said = refusal("edit", *(model if word == "MODEL" else word for word in words))
    assert said.startswith(message) and "\n" not in said
    assert sorted(home.iterdir()) == before


def test_a_long_sliver_is_refused_before_it_is_enlarged(home: Path, model: str) -> None:
    Image.new("RGB", (8000, 2)).save("sliver.png")
    assert refusal("edit", model, "sliver.png", "x").startswith("error: sliver.png: expected edges from 4 to 4096 ")


def test_a_canvas_that_fits_is_not_enlarged(home: Path, model: str) -> None:
    """The pipeline's own lines do this with the same numbers; the picture's pixels are in the result."""
    half = opened("small.png").crop((0, 0, 10, 16))
    half.save("half.png")
    main(["edit", model, "half.png", "x", *STEPS, "--expand", "right=6", "--out", "whole.png"])
    whole = opened("whole.png")
    assert whole.size == (16, 16)
    assert whole.convert("RGB").crop((0, 0, 10, 16)).tobytes() == half.convert("RGB").tobytes()
