"""Each script of examples/ is short, and does what it says with a tiny model."""

from __future__ import annotations

import io
import runpy
import threading
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import road
import tiny
import torch
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionPipeline
from PIL import Image

SCRIPTS = sorted((road.ROOT / "examples").glob("*.py"))


def run(name: str, function: str, *arguments: str) -> Any:
    """Call a function of a script with the words of its command line."""
    return runpy.run_path(str(road.ROOT / f"examples/{name}.py"))[function](*arguments)


def pixels(file: Any) -> np.ndarray:
    with Image.open(file) as picture:
        return np.asarray(picture.convert("RGB"))


def noise(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def stock(tiny_pipeline_folder: Path) -> Any:
    return StableDiffusionPipeline.from_pretrained(tiny_pipeline_folder)


def test_there_are_five_short_ones() -> None:
    assert [script.stem for script in SCRIPTS] == ["edit", "evaluate", "sample", "serve", "train"]
    assert max(len(script.read_text("utf-8").splitlines()) for script in SCRIPTS) <= 30


def test_train(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    road.draw_folder(tmp_path / "data")
    tiny.save_text_encoder(tmp_path / "text", "bert")
    recipe = road.save_recipe(road.recipe(tmp_path), tmp_path / "recipe.yaml")
    words = ["--config", str(recipe), "vae_training.steps=4", "loop.steps=3", "loop.evaluate_every=0"]
    run("train", "main", str(tmp_path / "data"), str(tmp_path / "mine"), *words)
    assert "3 steps, the last loss " in capsys.readouterr().out
    made = [pixels(tmp_path / f"mine/example-{i}.png") for i in range(2)]
    assert made[0].shape == (16, 16, 3) and not np.array_equal(*made)
    StableDiffusionPipeline.from_pretrained(tmp_path / "mine/pipeline")
    run("train", "main", str(tmp_path / "data"), str(tmp_path / "mine"), *words)
    assert "nothing was left to train" in capsys.readouterr().out


def test_sample(tiny_pipeline_folder: Path, stock: Any, tmp_path: Path) -> None:
    run("sample", "main", str(tiny_pipeline_folder), str(tmp_path))
    named = {"num_inference_steps": 20, "guidance_scale": 3.0, "negative_prompt": "blue"}
    (expected,) = stock("red heart", generator=noise(7), **named).images
    assert np.array_equal(pixels(tmp_path / "named.png"), np.asarray(expected))
    assert len(list(tmp_path.glob("*.png"))) == 2 + 1 + 4


def test_edit(tiny_pipeline_folder: Path, tmp_path: Path) -> None:
    run("edit", "main", str(tiny_pipeline_folder), str(tmp_path))
    edit = StableDiffusionImg2ImgPipeline.from_pretrained(tiny_pipeline_folder)
    before = Image.open(tmp_path / "before.png")
    settings = {"strength": 0.9, "num_inference_steps": 20, "guidance_scale": 3.0, "generator": noise(7)}
    (expected,) = edit("blue heart", image=before, **settings).images
    assert np.array_equal(pixels(tmp_path / "after.png"), np.asarray(expected))
    assert not np.array_equal(np.asarray(expected), np.asarray(before))


def test_evaluate(tiny_pipeline_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    road.draw_folder(tmp_path / "data")
    run("evaluate", "main", str(tiny_pipeline_folder), str(tmp_path / "data"), str(tmp_path / "out"))
    assert (tmp_path / "out/evaluation.json").exists() and (tmp_path / "out/report.html").exists()
    assert "top-1" in capsys.readouterr().out


def test_serve(tiny_pipeline_folder: Path, stock: Any) -> None:
    server = run("serve", "build_server", str(tiny_pipeline_folder), "0")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}/?prompt=red+heart&seed=9"
    try:
        with urllib.request.urlopen(address, timeout=60) as answer:
            found = pixels(io.BytesIO(answer.read()))
        (expected,) = stock("red heart", num_inference_steps=20, guidance_scale=3.0, generator=noise(9)).images
        assert np.array_equal(found, np.asarray(expected))  # the tiny model's own defaults
        for wrong in ("seed=-1", "seed=many"):
            with pytest.raises(urllib.error.HTTPError, match="400"):
                urllib.request.urlopen(address.replace("seed=9", wrong), timeout=60)
    finally:
        server.shutdown()
        server.server_close()
