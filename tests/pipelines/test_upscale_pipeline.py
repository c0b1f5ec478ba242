"""Upscalers: stock's bits from the same folder, whole pictures and tiles, and the folder `upscaler/` behind a base."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from diffusers import DiffusionPipeline, EulerAncestralDiscreteScheduler, StableDiffusionPipeline
from diffusers import StableDiffusionUpscalePipeline as Stock
from PIL import Image

from ldm import LDMPipeline
from ldm.models.safety import check_model_folder
from ldm.models.vae import VAEConfig, build_vae, decode, encode, fold_scale
from ldm.pipelines.upscale import LDMUpscalePipeline

WORDS: dict[str, Any] = {"num_inference_steps": 3, "guidance_scale": 1.0}


def picture(seed: int = 0, width: int = 16, height: int = 16) -> Image.Image:
    small = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An upscaler."""
    home = tmp_path_factory.mktemp("upscaler")
    tiny.upscale_pipeline(home / "text").save_pretrained(home / "model")
    return home / "model"


@pytest.fixture(scope="module")
def pipe(folder: Path) -> Any:
    return quiet(LDMUpscalePipeline.from_pretrained(folder))


@pytest.fixture(scope="module")
def stock(folder: Path) -> Any:
    return quiet(Stock.from_pretrained(folder))


@pytest.fixture(scope="module")
def cascade(folder: Path, tiny_pipeline_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline with the upscaler behind it."""
    base = LDMPipeline.from_pretrained(tiny_pipeline_folder)
    base.upscaler = LDMUpscalePipeline.from_pretrained(folder)
    out = tmp_path_factory.mktemp("cascade") / "model"
    base.save_pretrained(out)
    return out


def run(pipe: Any, prompt: Any = "red heart", **given: Any) -> np.ndarray:
    if "seed" not in given and "generator" not in given:
        given["generator"] = torch.Generator().manual_seed(3)
    return np.asarray(pipe(prompt, **{"output_type": "np", "image": picture(), **WORDS, **given}).images)


# --- the folder -------------------------------------------------------------------------------------


def test_stock_opens_the_folder_and_the_text_to_image_pipeline_does_not(folder: Path, cascade: Path) -> None:
    assert json.loads((folder / "model_index.json").read_text("utf-8"))["_class_name"] == Stock.__name__
    check_model_folder(folder)
    assert type(DiffusionPipeline.from_pretrained(folder)) is Stock
    with pytest.raises(
        ValueError, match="it is an upscaler, which makes large pictures of small ones; run: ldm upscale"
    ):
        LDMPipeline.from_pretrained(folder)
    with pytest.raises(ValueError, match="it is no upscaler but a StableDiffusionPipeline"):
        LDMUpscalePipeline.from_pretrained(cascade)


@torch.no_grad()
def test_the_scale_that_stock_forces_is_folded_into_the_weights() -> None:
    """Scaled latents and decoded pixels stay, posterior noise included."""
    torch.manual_seed(0)
    vae, pixels = build_vae(VAEConfig(channels=(16, 32), layers=1)).eval(), torch.rand(2, 3, 16, 16) * 2 - 1
    before = encode(vae, pixels)
    decoded = decode(vae, before.mean)
    fold_scale(vae, 0.08333)
    after = encode(vae, pixels)
    torch.testing.assert_close(after.mean, before.mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(after.std, before.std, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(decode(vae, after.mean), decoded, rtol=1e-4, atol=1e-4)
    assert vae.config.scaling_factor == 0.08333  # the value that stock leaves alone
    vae.quant_conv = None
    with pytest.raises(ValueError, match="vae: expected an AutoencoderKL with quant convolutions"):
        fold_scale(vae, 1.0)


# --- the loop ---------------------------------------------------------------------------------------

GIVEN: dict[str, dict[str, Any]] = {
    "unguided": {},
    "guided": {"guidance_scale": 3.0, "negative_prompt": "blue cat"},
    "much noise": {"noise_level": 300},
    "none": {"noise_level": 0, "guidance_scale": 2.0},
    "wide": {"image": picture(1, 16, 8)},
    "two": {"prompt": ["red heart", "cat"], "image": [picture(), picture(1)], "guidance_scale": 2.0, "two": True},
    "a tensor": {"image": torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(1))},
    "stochastic": {"ancestral": True, "guidance_scale": 2.0},
}  # fmt: skip


@pytest.mark.parametrize("name", GIVEN)
def test_pictures_are_stock_s_to_the_bit(name: str, folder: Path, pipe: Any, stock: Any) -> None:
    given = dict(GIVEN[name])
    two, ancestral = given.pop("two", False), given.pop("ancestral", False)
    found = []
    for one in (pipe, stock):
        before = one.scheduler
        if ancestral:
            one.scheduler = EulerAncestralDiscreteScheduler.from_config(one.scheduler.config)
        chance = {"generator": [torch.Generator().manual_seed(seed) for seed in (1, 2)]} if two else {}
        found.append(run(one, **given, **chance))
        one.scheduler = before
    assert np.array_equal(*found) and found[0].std() > 0.01


def test_defaults_are_the_model_s_and_what_a_call_leaves_out_is_stock_s(pipe: Any) -> None:
    assert (pipe.resolve(None, None), pipe.resolve(7, None).guidance_scale) == (pipe.defaults, 9.0)
    assert pipe.resolve(None, 2.0).num_inference_steps == 75


def test_the_small_picture_its_noise_level_and_the_prompt_decide(pipe: Any) -> None:
    first = run(pipe)
    for other in ({"image": picture(1)}, {"noise_level": 200}, {"prompt": "cat"}, {"seed": 4}):
        assert not np.array_equal(first, run(pipe, **other))


def test_edges_that_are_no_multiples_are_continued_and_cut_off(pipe: Any) -> None:
    odd = picture(0, 15, 13)
    whole = Image.fromarray(np.pad(np.asarray(odd), ((0, 1), (0, 1), (0, 0)), mode="edge"))
    found, expected = run(pipe, image=odd, output_type="latent"), run(pipe, image=whole, output_type="latent")
    assert found.shape == (1, 4, 13, 15) and np.array_equal(found, expected[..., :13, :15])


def test_a_picture_larger_than_the_network_s_is_cut_into_tiles(pipe: Any) -> None:
    """One tile is the whole picture; several are fused; the number of pictures at once changes nothing but rounding."""
    wide = picture(0, 40, 16)
    assert pipe.tile == 16
    tiled = run(pipe, image=wide, guidance_scale=2.0)
    assert tiled.shape == (1, 32, 80, 3) and np.isfinite(tiled).all()
    assert np.array_equal(run(pipe, image=wide, tile=40), run(pipe, image=wide, tile=48))
    assert not np.array_equal(tiled, run(pipe, image=wide, tile=40, guidance_scale=2.0))
    both = run(pipe, ["red heart"] * 2, image=[wide] * 2, seed=[5, 6], guidance_scale=2.0)
    assert np.abs(both[:1] - run(pipe, image=wide, seed=5, guidance_scale=2.0)).max() < 1e-4


def test_pictures_of_many_sizes_come_back_in_order(pipe: Any) -> None:
    pictures = [picture(0), picture(1, 24, 16), picture(2), picture(3)]
    found = pipe.upscale(pictures, batch_size=2, seed=5, **WORDS).images
    assert [one.size for one in found] == [(32, 32), (48, 32), (32, 32), (32, 32)]
    for i, (small, large) in enumerate(zip(pictures, found, strict=True)):
        (alone,) = pipe("", image=small, seed=5 + i, keep_colors=True, **WORDS).images
        assert np.abs(np.asarray(large).astype(int) - np.asarray(alone)).max() <= 1
    assert pipe.upscale(pictures[0], output_type="np", seed=1, **WORDS).images.shape == (1, 32, 32, 3)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"image": None}, "image: name the pictures to upscale"),
        ({"image": "cat.png"}, "image: expected a PIL picture, an array, a tensor or a list, got str"),
        ({"image": np.zeros((16, 16), np.uint8)}, r"image: expected \[H,W,3\]"),
        ({"image": [picture(), picture(0, 24)]}, "image: expected pictures of one size, got 16 x 16 and 24 x 16"),
        ({"image": picture(0, 16, 1)}, "image: expected edges from 2 to 1024 pixels, got 16 x 1"),
        ({"image": picture(0, 16, 1026)}, "image: expected edges from 2 to 1024 pixels, got 16 x 1026"),
        ({"noise_level": 351}, "noise_level: expected a whole number from 0 to 350, got 351"),
        ({"noise_level": 1.5}, "noise_level: expected a whole number"),
        ({"num_inference_steps": 0}, "num_inference_steps: expected a whole number"),
        ({"guidance_scale": float("nan")}, "guidance_scale: expected a number"),
        ({"output_type": "png"}, "output_type: expected one of"),
        ({"tile": 5}, "tile: expected a multiple of 2, got 5"),
        ({"overlap": 9}, "overlap: expected a whole number from 0 to 8, got 9"),
        ({"prompt": ["a", "b"]}, "prompt: expected 1 or 1"),
        ({"sampler": "dpm"}, "sampler: expected one of"),
    ],
)
def test_bad_arguments_are_one_line_before_anything_runs(
    given: dict[str, Any], message: str, pipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipe.unet, "forward", lambda *_, **__: pytest.fail("the U-Net ran"))
    with pytest.raises(ValueError, match=message) as raised:
        run(pipe, **{"prompt": "red heart", **given})
    assert "\n" not in str(raised.value)
    with pytest.raises(TypeError, match="noise_leve: there is no such argument; did you mean noise_level"):
        run(pipe, noise_leve=3)


# --- behind a base ----------------------------------------------------------------------------------


def test_a_base_finds_its_upscaler_and_stock_ignores_it(cascade: Path, tiny_pipeline_folder: Path, pipe: Any) -> None:
    base = quiet(LDMPipeline.from_pretrained(cascade))
    assert base.has_upscaler and base._upscaler is None  # until it is used
    small = base("red heart", seed=3, num_inference_steps=2, guidance_scale=2.0).images
    large = base(["red heart"] * 2, seed=3, num_inference_steps=2, guidance_scale=2.0, upscale=True).images
    assert [one.size for one in large] == [(32, 32)] * 2
    assert np.array_equal(
        np.asarray(base.upscale(small, "red heart", seed=8, **WORDS).images[0]),
        np.asarray(pipe.upscale(small, "red heart", seed=8, **WORDS).images[0]),
    )
    assert base("cat", seed=3, num_inference_steps=2, upscale=True, output_type="np").images.shape == (1, 32, 32, 3)
    words = {"num_inference_steps": 2, "output_type": "np", "generator": torch.Generator().manual_seed(1)}
    plain, behind = (
        quiet(StableDiffusionPipeline.from_pretrained(one))("cat", **words, height=16, width=16).images
        for one in (tiny_pipeline_folder, cascade)
        for _ in [words["generator"].manual_seed(1)]
    )
    assert np.array_equal(plain, behind)


def test_a_callback_sees_the_upscaler_s_steps_and_can_stop_it(cascade: Path) -> None:
    base = quiet(LDMPipeline.from_pretrained(cascade))
    seen: list[tuple[int, tuple[int, ...]]] = []

    def look(_: Any, i: int, t: Any, state: dict[str, Any]) -> dict[str, Any]:
        seen.append((i, tuple(state["latents"].shape)))
        return state

    words: dict[str, Any] = {"seed": 3, "num_inference_steps": 2, "upscale": True}
    looked = base(["cat"] * 2, **words, callback_on_step_end=look).images
    steps = 2 + base.upscaler.resolve(None, None).num_inference_steps
    assert [i for i, _ in seen] == list(range(steps))
    assert np.array_equal(looked[1], base(["cat"] * 2, **words).images[1])

    def stop(_: Any, i: int, *__: Any) -> dict[str, Any]:
        if i == 3:
            raise InterruptedError
        return {}

    with pytest.raises(InterruptedError):
        base("cat", **words, callback_on_step_end=stop)


def test_saving_keeps_the_upscaler_and_from_pipe_too(cascade: Path, tmp_path: Path) -> None:
    base = LDMPipeline.from_pretrained(cascade)
    base.save_pretrained(tmp_path / "again")
    for one in (
        "model_index.json",
        "unet/diffusion_pytorch_model.safetensors",
        "low_res_scheduler/scheduler_config.json",
    ):
        assert (tmp_path / "again/upscaler" / one).read_bytes() == (cascade / "upscaler" / one).read_bytes()
    assert LDMPipeline.from_pipe(base).has_upscaler
    base.upscaler = None
    assert not base.has_upscaler


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"width": 1032}, "upscale: expected edges from 2 to 1024 pixels, got 1032 x 16"),
        ({"prompt": "red " * 9}, "upscale: expected at most 8 tokens, got 11 in 'red red red"),
    ],
)
def test_what_the_upscaler_can_t_take_is_refused_before_the_base_runs(
    words: dict[str, Any], message: str, cascade: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = quiet(LDMPipeline.from_pretrained(cascade))
    base.upscaler.tokenizer.model_max_length = 8
    monkeypatch.setattr(base.unet, "forward", lambda *_, **__: pytest.fail("the base's U-Net ran"))
    with pytest.raises(ValueError, match=message):
        base(**{"prompt": "cat", **words}, upscale=True)


def test_no_upscaler_is_one_line_before_anything_runs(tiny_pipeline_folder: Path, cascade: Path) -> None:
    base = LDMPipeline.from_pretrained(tiny_pipeline_folder)
    for call in (lambda: base.upscale(picture()), lambda: base("cat", upscale=True)):
        with pytest.raises(FileNotFoundError, match="has no folder upscaler/; train an upscaler with") as raised:
            call()
        assert "\n" not in str(raised.value)
    with pytest.raises(ValueError, match="upscaler: expected an LDMUpscalePipeline, got LDMPipeline"):
        base.upscaler = base
    with pytest.raises(ValueError, match="output_type: an upscaler takes pictures, not latents; expected"):
        LDMPipeline.from_pretrained(cascade)("cat", upscale=True, output_type="latent")
