"""Models that were trained to inpaint: stock's bits from the same folder; a prompt alone is a picture all masked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import tiny
import torch
from diffusers import AutoPipelineForInpainting, DiffusionPipeline, StableDiffusionInpaintPipeline
from PIL import Image

from ldm.models.safety import check_model_folder
from ldm.pipelines.text_to_image import LDMPipeline

WORDS: dict[str, Any] = {"num_inference_steps": 4, "guidance_scale": 3.0, "height": 16, "width": 16}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("inpainting")
    tiny.inpaint_pipeline(home / "encoder").save_pretrained(home / "model")
    return home / "model"


def load(kind: Any, folder: Path) -> Any:
    pipe = kind.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def picture(seed: int = 0) -> Image.Image:
    small = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((16, 16), Image.Resampling.BICUBIC)


def box(*corners: int) -> Image.Image:
    mask = Image.new("L", (16, 16))
    mask.paste(255, corners)
    return mask


def run(pipe: Any, prompt: Any = "red heart", **given: Any) -> np.ndarray:
    if "seed" not in given and "generator" not in given:
        given["generator"] = torch.Generator().manual_seed(3)
    return np.asarray(pipe(prompt, **{**WORDS, "output_type": "latent", **given}).images)


@pytest.mark.parametrize("kind", [StableDiffusionInpaintPipeline, AutoPipelineForInpainting, DiffusionPipeline])
def test_stock_opens_the_folder_and_ours_too(kind: Any, folder: Path) -> None:
    assert (
        json.loads((folder / "model_index.json").read_text("utf-8"))["_class_name"] == "StableDiffusionInpaintPipeline"
    )
    check_model_folder(folder)
    assert type(load(kind, folder)) is StableDiffusionInpaintPipeline
    ours = load(LDMPipeline, folder)
    assert (ours.inpaints, ours.extra_channels, ours.condition_channels) == (True, 5, 0)


GIVEN: dict[str, dict[str, Any]] = {
    "plain": {},
    "some of the picture is seen": {"strength": 0.6},
    "unguided": {"guidance_scale": 1.0},
    "everything": {"mask_image": box(0, 0, 16, 16)},
    "a mask on no border of latents": {"mask_image": box(3, 5, 9, 12)},
    "two": {"prompt": ["red heart", "cat"], "image": [picture(), picture(1)],
            "mask_image": [box(0, 0, 8, 16), box(3, 3, 9, 9)], "generator": "two"},
    "noise": {"sampler": "euler-a"},
    "two evaluations": {"sampler": "heun", "strength": 0.8},
}  # fmt: skip


@pytest.mark.parametrize("name", GIVEN)
def test_latents_and_masked_pixels_are_stock_s_to_the_bit(name: str, folder: Path) -> None:
    given = {"image": picture(), "mask_image": box(8, 0, 16, 16), **GIVEN[name]}
    sampler = given.pop("sampler", None)
    found = {}
    for kind in ("latent", "np"):
        ours, stock = load(LDMPipeline, folder), load(StableDiffusionInpaintPipeline, folder)
        if sampler:
            class_name = {"euler-a": "EulerAncestralDiscreteScheduler", "heun": "HeunDiscreteScheduler"}[sampler]
            for pipe in (ours, stock):
                pipe.scheduler = getattr(diffusers, class_name).from_config(pipe.scheduler.config)
        for which, pipe in (("ours", ours), ("stock", stock)):
            seeds = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
            chance = {"generator": seeds} if given.get("generator") == "two" else {}
            found[kind, which] = run(pipe, output_type=kind, **{**given, **chance})
    assert np.array_equal(found["latent", "ours"], found["latent", "stock"]) and found["latent", "ours"].std() > 0.01
    masks = given["mask_image"] if isinstance(given["mask_image"], list) else [given["mask_image"]]
    sources = given["image"] if isinstance(given["image"], list) else [given["image"]]
    for i, (mask, source) in enumerate(zip(masks, sources, strict=True)):
        new, pixels = np.asarray(mask) >= 128, np.asarray(source) / np.float32(255)
        assert np.array_equal(found["np", "ours"][i][new], found["np", "stock"][i][new])
        np.testing.assert_allclose(found["np", "ours"][i][~new], pixels[~new], atol=1e-6)  # the picture's own


def test_the_mask_and_what_it_leaves_decide(folder: Path) -> None:
    pipe = load(LDMPipeline, folder)
    first = run(pipe, image=picture(), mask_image=box(8, 0, 16, 16))
    assert not np.array_equal(first, run(pipe, image=picture(), mask_image=box(0, 0, 8, 16)))
    assert not np.array_equal(first, run(pipe, image=picture(1), mask_image=box(8, 0, 16, 16)))


def test_a_prompt_alone_is_a_picture_that_is_masked_everywhere(folder: Path) -> None:
    """What a picture has under the mask is not seen, so any picture gives the same."""
    ours, stock = load(LDMPipeline, folder), load(StableDiffusionInpaintPipeline, folder)
    alone = run(ours)
    for seen in (picture(), picture(1)):
        assert np.array_equal(alone, run(stock, image=seen, mask_image=box(0, 0, 16, 16)))
    assert run(ours, seed=0, output_type="np").shape == (1, 16, 16, 3)
    many = run(ours, num_images_per_prompt=2, seed=5)
    for i in range(2):
        assert np.abs(many[i] - run(ours, seed=5 + i)[0]).max() < 1e-4


def test_outpainting_and_a_second_device_of_guidance(folder: Path) -> None:
    pipe = load(LDMPipeline, folder)
    wide = run(pipe, image=picture(), expand=(0, 0, 8, 0), output_type="np", height=None, width=None)
    assert wide.shape == (1, 16, 24, 3)
    np.testing.assert_allclose(wide[0][:, :16], np.asarray(picture()) / np.float32(255), atol=1e-6)
    weak = load(LDMPipeline, folder).unet
    assert np.array_equal(run(pipe, weak_unet=weak, guidance_scale=3.0), run(pipe, guidance_scale=1.0))


def test_a_picture_without_a_mask_is_refused(folder: Path) -> None:
    pipe = load(LDMPipeline, folder)
    with pytest.raises(ValueError, match="mask_image: this model fills in masked parts; give it the part of image"):
        run(pipe, image=picture())
    with pytest.raises(ValueError, match="condition: this model takes no second picture"):
        run(pipe, condition=picture())
