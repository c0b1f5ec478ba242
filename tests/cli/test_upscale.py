"""`ldm upscale`, `ldm sample --upscale`, `ldm export --upscaler`: the pipeline's pictures, and refusals of a line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import road
import tiny
from PIL import Image

from ldm import LDMPipeline
from ldm.cli.main import main
from ldm.pipelines.upscale import LDMUpscalePipeline
from ldm.sharing import png_metadata

STEPS = ("--dtype", "float32", "--steps", "2", "--guidance-scale", "2")
WORDS: dict[str, Any] = {"num_inference_steps": 2, "guidance_scale": 2.0}


@pytest.fixture(scope="module")
def upscaler(tmp_path_factory: pytest.TempPathFactory) -> str:
    home = tmp_path_factory.mktemp("cli-upscale")
    tiny.upscale_pipeline(home / "text").save_pretrained(home / "model")
    return str(home / "model")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, with two small pictures."""
    monkeypatch.chdir(tmp_path)
    Path("small").mkdir()
    for name, size in (("a", (16, 16)), ("b", (16, 8))):
        pixels = np.random.default_rng(len(name)).integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC).save(f"small/{name}.png")
    return tmp_path


def opened(file: str) -> Any:
    with Image.open(file) as picture:
        picture.load()
        return picture


def refusal(*words: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        main(list(words))
    return str(stopped.value.code)


def test_a_picture_and_a_folder_are_the_pipeline_s_with_their_settings(home: Path, upscaler: str) -> None:
    words = ["--prompt", "red heart", "--seed", "5", "--noise-level", "50"]
    main(["upscale", upscaler, "small/a.png", "--out", "large.png", *STEPS, *words])
    main(["upscale", upscaler, "small", "--out", "large", *STEPS, *words])
    pipe: Any = LDMUpscalePipeline.from_pretrained(upscaler)
    for i, name in enumerate("ab"):
        small = opened(f"small/{name}.png")
        (expected,) = pipe("red heart", image=small, seed=5 + i, noise_level=50, keep_colors=True, **WORDS).images
        assert np.array_equal(np.asarray(opened(f"large/{name}.png")), np.asarray(expected))
        found = png_metadata.read(Path(f"large/{name}.png"))
        assert (found.seed, found.noise_level, found.steps, found.prompt) == (5 + i, 50, 2, "red heart")
        assert found.image == png_metadata.picture_sha256(small)
    assert np.array_equal(np.asarray(opened("large.png")), np.asarray(opened("large/a.png")))
    assert "it was upscaled from a picture that the file does not hold" in refusal("sample", "--like", "large.png")


def test_the_upscaler_behind_a_model(home: Path, upscaler: str, tiny_pipeline_folder: Path) -> None:
    """Exported with it in half precision; sampled through it and again, byte for byte; its prompt is in the file."""
    main(["export", str(tiny_pipeline_folder), "both", "--upscaler", upscaler])
    main(["sample", "both", "red heart", "--upscale", *STEPS, "--out", "heart.png", "--seed", "3"])
    assert opened("heart.png").size == (32, 32)
    found = png_metadata.read(Path("heart.png"))
    assert (found.width, found.height, found.noise_level) == (16, 16, None) and len(str(found.upscaler)) == 64
    main(["sample", "both", "--like", "heart.png", "--out", "again.png"])
    assert Path("again.png").read_bytes() == Path("heart.png").read_bytes()
    Path("models").mkdir()
    Path("models/a").symlink_to(tiny_pipeline_folder)  # the same base without an upscaler
    with pytest.raises(SystemExit, match=r"with the upscaler \w+… behind it, as none of these has: models/a; name its"):
        main(["sample", "--like", "heart.png", "--out", "found.png"])
    Path("models/b").symlink_to(Path("both").resolve())
    main(["sample", "--like", "heart.png", "--out", "found.png"])
    assert Path("found.png").read_bytes() == Path("heart.png").read_bytes()
    main(["sample", "both", "cat", *STEPS, "--out", "cat.png"])
    main(["upscale", "both", "cat.png", "--out", "large.png", *STEPS])
    assert png_metadata.read(Path("large.png")).prompt == "cat"
    base: Any = LDMPipeline.from_pretrained("both")
    (expected,) = base.upscale(opened("cat.png"), "cat", seed=0, **WORDS).images
    assert np.array_equal(np.asarray(opened("large.png")), np.asarray(expected))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["none.png"], "error: none.png: expected a picture, got no such file"),
        (["text.png"], "error: text.png: picture is of an unknown kind"),
        (
            ["none.png", "text.png"],
            "error: none.png: expected a picture, got no such file; the order is MODEL PICTURE ...\ntext.png: picture",
        ),
        (["empty"], "error: empty: expected pictures in the folder"),
        (
            ["small", "--out", "one.png"],
            "error: --out one.png: is one picture, and there are 2 to upscale; name a folder",
        ),
        (["small", "--out", "small"], "error: --out small: small/a.png is one of the pictures to upscale"),
        (["small/a.png", "--out", "one.gif"], "error: --out one.gif: expected a folder, or a file that ends in .png"),
        (["small/a.png", "a.jpg"], "error: --out upscaled: small/a.png and a.jpg would both be a.png"),
    ],
)
def test_pictures_of_a_wrong_kind_are_refused_before_a_network_is_loaded(
    words: list[str], message: str, home: Path, upscaler: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LDMUpscalePipeline, "from_pretrained", lambda *_, **__: pytest.fail("a network was loaded"))
    Path("text.png").write_text("hello")
    Path("empty").mkdir()
    opened("small/a.png").save("a.jpg")
    said = refusal("upscale", upscaler, *words)
    assert said.startswith(message) and said.count("\n") == message.count("\n")


def test_what_is_missing_is_named_in_its_order(home: Path, upscaler: str) -> None:
    assert refusal("upscale", "small/a.png") == (
        "error: model: small/a.png is a picture; the order is: ldm upscale MODEL PICTURE ..."
    )
    said = f"error: pictures: name what to make larger: ldm upscale {upscaler} PICTURE ..."
    assert refusal("upscale", upscaler) == said


def test_models_of_a_wrong_kind_are_refused(home: Path, upscaler: str, tiny_pipeline_folder: Path) -> None:
    base = str(tiny_pipeline_folder)
    assert f"{base} has no folder upscaler/; train an upscaler" in refusal("upscale", base, "small/a.png")
    assert f"{base} has no folder upscaler/; train an upscaler" in refusal("sample", base, "cat", "--upscale")
    assert "it is an upscaler, which makes large pictures of small ones" in refusal("sample", upscaler, "cat")
    assert "it is no upscaler but a StableDiffusionPipeline" in refusal("export", base, "out", "--upscaler", base)
    Image.new("RGB", (2000, 8)).save("long.png")
    said = refusal("upscale", upscaler, "long.png")
    assert said == "error: long.png: expected edges from 2 to 1024 pixels, got 2000 x 8"


@pytest.mark.parametrize(
    "words", [("--nll",), ("--ema", "0.1"), ("--sweep",), ("--lora", "some"), ("--steps", "5"), ("--seeds", "2")]
)
def test_what_only_other_models_are_evaluated_with_is_refused(
    words: tuple[str, ...], home: Path, upscaler: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LDMUpscalePipeline, "from_pretrained", lambda *_, **__: pytest.fail("a network was loaded"))
    road.draw_folder(home / "data")
    said = refusal("evaluate", upscaler, "--data", "data", *words)
    assert said == f"error: {words[0]}: {upscaler} is an upscaler, which is not evaluated with it; leave it out"


def test_captions_that_are_too_long_are_left_out_of_an_evaluation(home: Path, upscaler: str) -> None:
    """As previews leave them out: the upscaler then has the small picture alone."""
    road.draw_folder(home / "data", 2 * tiny.SIZE)
    rows = (home / "data/metadata.jsonl").read_text("utf-8")
    (home / "data/metadata.jsonl").write_text(rows.replace('"text": "', '"text": "' + "red " * 12), "utf-8")
    main(["evaluate", upscaler, "--data", "data", "--holdout", "0.5", "--pictures", "3", "--out", "found"])
    assert (home / "found/upscaling.json").exists()
