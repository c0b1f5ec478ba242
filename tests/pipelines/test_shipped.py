"""The model that comes with the repository: small, stock, licensed, and able to draw what its README shows."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import road
import torch
from diffusers import StableDiffusionPipeline
from safetensors import safe_open

from ldm import LDMPipeline
from ldm.cli.find import default_model
from ldm.models.fingerprint import model_sha256

FOLDER = road.ROOT / "models/openmoji64"


@pytest.fixture(scope="module")
def pipe() -> LDMPipeline:
    pipe = LDMPipeline.from_pretrained(FOLDER)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_it_is_small_and_half_precision() -> None:
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) <= 100e6
    files = list(FOLDER.rglob("*.safetensors"))
    assert {path.parent.name for path in files} == {"unet", "vae", "text_encoder"}
    for path in files:
        with safe_open(path, "pt") as weights:
            kinds = {weights.get_slice(name).get_dtype() for name in weights.keys()}  # noqa: SIM118  not a dict
        assert kinds <= {"F16", "I64"}


def test_it_says_whose_drawings_it_learned() -> None:
    told = (FOLDER / "README.md").read_text("utf-8")
    assert "CC BY-SA 4.0" in told
    assert "openmoji.org" in told


def test_its_report_is_about_it(pipe: LDMPipeline) -> None:
    page = (FOLDER / "report.html").read_text("utf-8")
    assert model_sha256(pipe)[:12] in page
    for figure in ("PSNR", "top-1", "KID"):
        assert figure in page
    assert not re.search(r"/(?:home|root|tmp|Users)/", page)


def test_it_is_the_default_of_the_page(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(road.ROOT)
    assert Path(default_model()) == Path("models/openmoji64")


def test_stock_diffusers_draws_the_same(pipe: LDMPipeline) -> None:
    stock = StableDiffusionPipeline.from_pretrained(FOLDER)
    stock.set_progress_bar_config(disable=True)
    told = {"num_inference_steps": 4, "guidance_scale": 3.0, "output_type": "np"}
    ours, theirs = (
        one(prompt="red heart", generator=torch.Generator().manual_seed(1), **told).images for one in (pipe, stock)
    )
    assert np.abs(ours - theirs).max() == 0
    assert ours.std() > 0.1


@pytest.mark.parametrize(("prompt", "channel"), [("red heart", 0), ("green circle", 1)])
def test_it_draws_a_shape_of_that_color_on_white(pipe: LDMPipeline, prompt: str, channel: int) -> None:
    pictures = pipe(prompt, num_images_per_prompt=4, seed=0, output_type="np").images
    assert (pictures[:, :4, :4].mean(axis=(1, 2, 3)) > 0.9).all()  # a corner
    inside = pictures[:, 24:40, 24:40].mean(axis=(1, 2))
    assert (inside.argmax(axis=1) == channel).sum() >= 2  # of 4; by chance it would be one


def test_it_knows_tones_of_skin(pipe: LDMPipeline) -> None:
    light, dark = (
        pipe(f"woman: {tone} skin tone", num_images_per_prompt=4, seed=0, output_type="np").images[:, 24:40, 28:36]
        for tone in ("light", "dark")
    )
    assert (light.mean(axis=(1, 2, 3)) > dark.mean(axis=(1, 2, 3)) + 0.2).all()
