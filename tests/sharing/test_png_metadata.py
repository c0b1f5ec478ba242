"""A picture says how it was drawn, and who draws by that gets the same bytes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import road
import tiny
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ldm.cli.main import main
from ldm.cli.sample import file_name
from ldm.models.fingerprint import model_sha256
from ldm.pipelines.text_to_image import LDMPipeline
from ldm.sharing import png_metadata as recipe

WORDS = [
    "--dtype",
    "float32",
    "--steps",
    "3",
    "--guidance-scale",
    "2.5",
    "--negative-prompt",
    "blue face",
    "--seed",
    "41",
]


@pytest.fixture(scope="module")
def drawn(tiny_pipeline_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two prompts, three pictures of each, drawn by a process of its own."""
    folder = tmp_path_factory.mktemp("recipe")
    command = [str(tiny_pipeline_folder), "red heart", "cat: ½", *WORDS, "--images-per-prompt", "3"]
    ldm("sample", *command, "--each", str(folder / "each"))
    return folder / "each"


def ldm(*words: str, cwd: Path | None = None) -> str:
    """The command in a process of its own."""
    told = f"import sys; sys.path.insert(0, {str(road.ROOT)!r}); from ldm.cli.main import main; main({list(words)!r})"
    done = subprocess.run([sys.executable, "-c", told], capture_output=True, text=True, timeout=120, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def test_another_process_draws_the_same_bytes(drawn: Path, tiny_pipeline_folder: Path, tmp_path: Path) -> None:
    picture = drawn / "00045-cat.png"  # the middle one of the second batch
    told = ldm("sample", "--like", str(picture), str(tiny_pipeline_folder), "--out", str(tmp_path / "again.png"))
    assert (tmp_path / "again.png").read_bytes() == picture.read_bytes()
    assert "the same picture, byte for byte" in told and "warning" not in told
    assert np.asarray(Image.open(picture)).std() > 5, "a flat picture proves nothing"


def test_every_file_draws_itself_again(drawn: Path, tiny_pipeline_folder: Path, tmp_path: Path) -> None:
    files = sorted(drawn.iterdir())
    names = [f"{seed:05d}-{words}.png" for seed, words in zip(range(41, 47), ["red-heart"] * 3 + ["cat"] * 3)]
    assert [file.name for file in files] == names
    assert len({file.read_bytes() for file in files}) == 6
    for file in files:
        main(["sample", "--like", str(file), str(tiny_pipeline_folder), "--out", str(tmp_path / "again.png")])
        assert (tmp_path / "again.png").read_bytes() == file.read_bytes()


def test_a_recipe_is_what_was_asked_and_draws_with_the_pipeline_alone(drawn: Path, tiny_pipeline_folder: Path) -> None:
    with Image.open(drawn / "00046-cat.png") as picture:
        said = json.loads(picture.text[recipe.KEY])  # type: ignore[attr-defined]
        kept = np.asarray(picture)
    pipe = LDMPipeline.from_pretrained(tiny_pipeline_folder)
    versions = said.pop("drawn_with")
    assert versions["torch"] == torch.__version__ and versions["device"] == "cpu"
    assert said == {
        "prompt": "cat: ½", "negative_prompt": "blue face", "seed": 46, "steps": 3, "guidance_scale": 2.5,
        "width": 16, "height": 16, "pictures": 3, "place": 2, "scheduler": "DPMSolverMultistepScheduler",
        "model": model_sha256(pipe),
    }  # fmt: skip
    again = pipe("cat: ½", negative_prompt="blue face", num_inference_steps=3, guidance_scale=2.5, seed=46).images[0]
    assert np.abs(np.asarray(again).astype(int) - kept).max() <= 1  # drawn alone: a batch's rounding


def test_one_picture_is_saved_as_it_is_and_several_as_a_grid(tiny_pipeline_folder: Path, tmp_path: Path) -> None:
    folder = str(tiny_pipeline_folder)
    main(["sample", folder, "red heart", "--steps", "2", "--out", str(tmp_path / "one.png")])
    assert Image.open(tmp_path / "one.png").size == (16, 16)
    assert recipe.read(tmp_path / "one.png").guidance_scale == 7.5  # stock's, once steps are named
    both = ["--out", str(tmp_path / "grid.png"), "--each", str(tmp_path / "each")]
    main(["sample", folder, "red heart", "cat", "--steps", "2", *both])
    assert Image.open(tmp_path / "grid.png").width > 2 * 128
    assert (tmp_path / "each/00000-red-heart.png").read_bytes() == (tmp_path / "one.png").read_bytes()


def test_another_model_is_said_to_be_another(
    drawn: Path, tiny_pipeline_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = LDMPipeline.from_pretrained(tiny_pipeline_folder)
    with torch.no_grad():
        next(other.unet.parameters()).mul_(1.5)
    other.save_pretrained(tmp_path / "other")
    words = ["sample", "--like", str(drawn / "00041-red-heart.png"), "--out", str(tmp_path / "again.png")]
    main([*words, str(tmp_path / "other")])
    told = capsys.readouterr()
    assert "warning: " in told.err and "is not the model that made it" in told.err
    assert "not the same file:\n  model: " in told.out and "byte for byte" not in told.out
    assert recipe.read(tmp_path / "again.png").model == model_sha256(other)


def test_the_model_is_found_by_its_hash(
    drawn: Path, tiny_pipeline_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["sample", "--like", str(drawn / "00041-red-heart.png")]
    with pytest.raises(
        SystemExit,
        match="the picture's model has .*, as none of these has: there are no models",
    ):
        main(words)
    other = tiny.pipeline(tmp_path / "text", prediction="v")
    other.save_pretrained(tmp_path / "models/other")
    shutil.copytree(tiny_pipeline_folder, tmp_path / "runs/mine/pipeline")
    main(words)
    assert (tmp_path / "samples.png").read_bytes() == (drawn / "00041-red-heart.png").read_bytes()


def test_a_class_alone_is_a_recipe(tmp_path: Path) -> None:
    tiny.class_pipeline(tmp_path / "text", ("food", "flags")).save_pretrained(tmp_path / "model")
    words = [str(tmp_path / "model"), "--steps", "2"]
    main(["sample", *words[:1], "--class-label", "flags", *words[1:], "--each", str(tmp_path / "each")])
    file = tmp_path / "each/00000-flags.png"
    assert recipe.read(file).class_label == "flags" and recipe.read(file).prompt is None
    main(["sample", "--like", str(file), str(tmp_path / "model"), "--out", str(tmp_path / "again.png")])
    assert (tmp_path / "again.png").read_bytes() == file.read_bytes()


# --- what can't be drawn again -------------------------------------------------------------------


def carrying(path: Path, said: Any) -> Path:
    info = PngInfo()
    info.add_text(recipe.KEY, said if isinstance(said, str) else json.dumps(said))
    Image.new("RGB", (16, 16)).save(path, pnginfo=info)
    return path


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"steps": "three"}, "its settings: steps: expected int, got 'three'"),
        ({"steps": 2.5}, "its settings: steps: expected int"),
        ({"prompt": ["a"]}, "its settings: prompt: expected str"),
        ({"steps": 10**9}, "num_inference_steps: expected a whole number from 1"),
        ({"width": 10**6, "height": 10**6}, "height: expected a multiple of 8"),
        ({"pictures": 10**9}, "num_images_per_prompt: expected a whole number"),
        ({"place": 1}, "its settings: place: expected one of 1 pictures, got 1"),
        ({"seed": -1}, "its settings: place|seed: expected"),
        ({"guidance_scale": float("nan")}, "guidance_scale: expected a number"),
        ({"sampler": "dim"}, "its settings: sampler: expected one of .*did you mean ddim"),
        ({"extra": 1}, "its settings: expected an object with model, seed"),
        ({"condition": "0" * 64}, "it was made of another picture"),
        ({"classifier": "0" * 32, "classifier_scale": 1.0}, "was steered by a classifier; name it with --classifier"),
    ],
)
def test_a_bad_recipe_is_refused_by_name(
    tiny_pipeline_folder: Path, tmp_path: Path, change: dict[str, Any], told: str
) -> None:
    good = {"model": "0" * 64, "seed": 0, "steps": 2, "guidance_scale": 3.0, "width": 16, "height": 16}
    path = carrying(tmp_path / "a.png", {**good, "scheduler": "Any", "prompt": "cat", **change})
    with pytest.raises(SystemExit, match=told):
        main(["sample", "--like", str(path), str(tiny_pipeline_folder), "--out", str(tmp_path / "again.png")])
    assert not (tmp_path / "again.png").exists()


def test_a_file_without_a_recipe_is_refused(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "plain.png")
    (tmp_path / "text.png").write_text("hello")
    for path, told in (
        (tmp_path / "plain.png", "it holds no settings"),
        (tmp_path / "text.png", "cannot identify image file"),
        (tmp_path / "none.png", "there is no such file"),
        (carrying(tmp_path / "broken.png", "{"), "its settings are not JSON"),
    ):
        with pytest.raises(SystemExit, match=f"error: .*{told}"):
            main(["sample", "--like", str(path)])
    with pytest.raises(SystemExit, match="model: name a pipeline folder or a Hub id, then the prompts"):
        main(["sample"])
    with pytest.raises(SystemExit, match="has its own; leave them out"):
        main(["sample", "model", "cat", "--like", "a.png"])


def test_file_names_are_safe() -> None:
    assert file_name(7, "../../etc/passwd") == "00007-etc-passwd.png"
    assert file_name(7, "愛") == "00007.png" == file_name(7, None)
    assert len(file_name(7, "a" * 500)) < 80
