"""The model that comes with the repository: small, stock, licensed, and able to draw what its README shows."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import road
import torch
from diffusers import LCMScheduler, StableDiffusionPipeline, StableDiffusionUpscalePipeline
from safetensors import safe_open

from ldm import LDMPipeline
from ldm.cli.find import default_model
from ldm.models.fingerprint import model_sha256
from ldm.pipelines.upscale import LDMUpscalePipeline

FOLDER = road.ROOT / "models/emoji"


@pytest.fixture(scope="module")
def pipe() -> LDMPipeline:
    return quiet(LDMPipeline.from_pretrained(FOLDER))


def test_it_is_small_and_half_precision() -> None:
    sizes = [path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()]
    assert sum(sizes) <= 130e6
    assert max(sizes) < 50e6
    files = list(FOLDER.rglob("*.safetensors"))
    networks = {"unet", "vae", "text_encoder"}
    behind = {f"upscaler/{name}" for name in networks} | {"few_steps"}
    assert {path.parent.relative_to(FOLDER).as_posix() for path in files} == networks | behind
    for path in files:
        with safe_open(path, "pt") as weights:
            kinds = {weights.get_slice(name).get_dtype() for name in weights.keys()}  # noqa: SIM118  not a dict
        assert kinds <= {"F16", "I64"}


@pytest.mark.parametrize("license", ["CC BY-SA 4.0", "CC BY 4.0", "MIT", "Apache 2.0"])
def test_its_card_names_works_and_licenses(license: str) -> None:
    card = (FOLDER / "README.md").read_text("utf-8")
    assert license in card
    for designer in ("openmoji.org", "Twemoji", "Noto Emoji", "Fluent Emoji"):
        assert designer in card


def test_its_report_is_about_it(pipe: LDMPipeline) -> None:
    page = (FOLDER / "report.html").read_text("utf-8")
    assert model_sha256(pipe.student)[:12] in page  # the student generates what a call without settings returns
    for figure in ("PSNR", "top-1", "KID"):
        assert figure in page
    assert not re.search(r"/(?:home|root|tmp|Users)/", page)


def test_it_is_the_default_of_the_page(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(road.ROOT)
    assert Path(default_model()) == Path("models/emoji")


def test_stock_diffusers_generates_the_same(pipe: LDMPipeline) -> None:
    stock = quiet(StableDiffusionPipeline.from_pretrained(FOLDER))
    words = {"num_inference_steps": 4, "guidance_scale": 3.0, "output_type": "np"}
    ours, theirs = (
        one(prompt="red heart", generator=torch.Generator().manual_seed(1), **words).images for one in (pipe, stock)
    )
    assert np.abs(ours - theirs).max() == 0
    assert ours.std() > 0.1


def test_stock_diffusers_generates_the_same_with_the_student(pipe: LDMPipeline) -> None:
    stock = quiet(StableDiffusionPipeline.from_pretrained(FOLDER))
    stock.load_lora_weights(FOLDER / "few_steps")
    stock.fuse_lora()
    stock.unload_lora_weights()
    stock.scheduler = LCMScheduler.from_config(stock.scheduler.config)
    steps = pipe.student.defaults.num_inference_steps
    words = {"num_inference_steps": steps, "guidance_scale": 1.0, "output_type": "np", "height": 64, "width": 64}
    ours, theirs = (
        one("pink elephant", generator=torch.Generator().manual_seed(1), **given).images
        for one, given in ((pipe, {"output_type": "np"}), (stock, words))
    )
    assert np.abs(ours - theirs).max() == 0
    assert ours.std() > 0.1


def test_stock_diffusers_upscales_the_same(pipe: LDMPipeline) -> None:
    stock = quiet(StableDiffusionUpscalePipeline.from_pretrained(FOLDER / "upscaler"))
    ours = quiet(LDMUpscalePipeline.from_pretrained(FOLDER / "upscaler"))
    small = pipe("umbrella", seed=2).images[0]
    words = {"image": small, "num_inference_steps": 2, "guidance_scale": 1.0, "noise_level": 20, "output_type": "np"}
    large, expected = (
        one("umbrella", generator=torch.Generator().manual_seed(1), **words).images for one in (ours, stock)
    )
    assert large.shape == (1, 256, 256, 3)
    assert np.abs(large - expected).max() == 0


@pytest.mark.parametrize("color", ["red", "green", "blue"])
def test_it_generates_things_in_colors_that_it_was_not_trained_on(pipe: LDMPipeline, color: str) -> None:
    pictures = pipe(f"{color} elephant", num_images_per_prompt=4, seed=0, output_type="np").images
    assert (pictures[:, :4, :4].mean(axis=(1, 2, 3)) > 0.9).all()  # a corner
    inside = pictures[:, 24:40, 24:40].mean(axis=(1, 2))
    assert (inside.argmax(axis=1) == ["red", "green", "blue"].index(color)).sum() >= 3  # of 4; by chance one


def test_it_knows_tones_of_skin(pipe: LDMPipeline) -> None:
    light, dark = (
        pipe(f"woman: {tone} skin tone", num_images_per_prompt=4, seed=0, output_type="np").images[:, 24:40, 28:36]
        for tone in ("light", "dark")
    )
    assert (light.mean(axis=(1, 2, 3)) > dark.mean(axis=(1, 2, 3)) + 0.2).all()


def quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe
