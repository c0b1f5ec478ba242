"""Pictures changed by LDMPipeline: stock diffusers' bits, and what is to be kept stays as it is, to the bit."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import road
import tiny
import torch
from PIL import Image
from torch.nn.functional import pad

from ldm.data.images import decode, to_rgb
from ldm.inference.samplers import STOCK
from ldm.models.unet import UNetConfig, build_unet
from ldm.models.vae import VAEConfig
from ldm.pipelines.text_to_image import LDMPipeline

WORDS: dict[str, Any] = {"num_inference_steps": 5, "guidance_scale": 3.0, "output_type": "np"}
TWO = lambda: [seeded(1), seeded(2)]  # noqa: E731  new ones for each call


def quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seeded(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def loaded(tiny_pipeline_folder: Path) -> LDMPipeline:
    return quiet(LDMPipeline.from_pretrained(tiny_pipeline_folder))


@pytest.fixture
def pipe(loaded: LDMPipeline) -> LDMPipeline:
    return quiet(LDMPipeline(**loaded.components, requires_safety_checker=False))


@pytest.fixture
def img2img(loaded: LDMPipeline) -> Any:
    return quiet(diffusers.StableDiffusionImg2ImgPipeline(**loaded.components, requires_safety_checker=False))


@pytest.fixture
def inpaint(loaded: LDMPipeline) -> Any:
    return quiet(diffusers.StableDiffusionInpaintPipeline(**loaded.components, requires_safety_checker=False))


def photo(width: int = 16, height: int = 16, seed: int = 0, mode: str = "RGB") -> Image.Image:
    """A smooth picture of many colors."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 4, len(mode)), dtype=np.uint8).squeeze()
    return Image.fromarray(small, mode if mode == "L" else None).resize((width, height), Image.Resampling.BICUBIC)


def half(width: int = 16, height: int = 16) -> Image.Image:
    """A mask whose right half is new."""
    mask = Image.new("L", (width, height))
    mask.paste(255, (width // 2, 0, width, height))
    return mask


def run(pipe: Any, prompt: Any = "red heart", **arguments: Any) -> np.ndarray:
    if "seed" not in arguments:
        arguments.setdefault("generator", seeded())
    return np.asarray(pipe(prompt, **{**WORDS, **arguments}).images)


def array(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture)


# --- image-to-image --------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize("name", STOCK)
def test_every_sampler_changes_pictures_with_stock_s_bits(
    name: str, scale: float, pipe: LDMPipeline, img2img: Any
) -> None:
    kind, more = STOCK[name]
    img2img.scheduler = getattr(diffusers, kind).from_config({**img2img.scheduler.config, **more})
    given = {"image": photo(), "strength": 0.7, "guidance_scale": scale}
    ours = run(pipe, sampler=name, **given)
    assert np.array_equal(ours, run(img2img, **given)) and ours.std() > 0.01


ARRAY = np.random.default_rng(1).random((2, 16, 16, 3), dtype=np.float32)
SAME: dict[str, dict[str, Any]] = {
    "its own strength": {},
    "all of the noise": {"strength": 1.0},
    "a single step": {"strength": 0.2},
    "timesteps": {"timesteps": [900, 600, 300, 100], "strength": 0.5},
    "sigmas": {"sigmas": [10.0, 4.0, 1.0, 0.2], "strength": 0.5, "scheduler": "EulerDiscreteScheduler"},
    "two evaluations": {"timesteps": [900, 600, 300, 100], "strength": 0.8, "scheduler": "HeunDiscreteScheduler"},
    "eta": {"eta": 1.0, "scheduler": "DDIMScheduler"},
    "a negative prompt": {"negative_prompt": "blue"},
    "prompts": {"prompt": ["red heart", "cat"], "generator": TWO},
    "copies": {"num_images_per_prompt": 2, "generator": TWO},
    "pictures": {"prompt": ["red heart", "cat"], "image": [photo(), photo(seed=1)], "generator": TWO},
    "an array": {"image": ARRAY[0]},
    "arrays": {"prompt": ["red heart", "cat"], "image": ARRAY, "generator": TWO},
    "a list of arrays": {"prompt": ["red heart", "cat"], "image": list(ARRAY), "generator": TWO},
    "a tensor": {"image": torch.from_numpy(ARRAY[0]).permute(2, 0, 1)},
    "latents": {"image": torch.randn(1, 4, 8, 8, generator=seeded())},
    "a size that does not fit": {"image": photo(25, 19)},
    "an array that does not fit": {"image": np.resize(ARRAY, (19, 25, 3))},
    "latent": {"output_type": "latent"},
    "pt": {"output_type": "pt"},
    "pil": {"output_type": "pil"},
}  # fmt: skip


@pytest.mark.parametrize("name", SAME)
def test_every_argument_has_stock_s_bits(name: str, pipe: LDMPipeline, img2img: Any) -> None:
    arguments = {"image": photo(), **SAME[name]}
    scheduler = arguments.pop("scheduler", "DPMSolverMultistepScheduler")
    found = []
    for each in (pipe, img2img):
        each.scheduler = getattr(diffusers, scheduler).from_config(each.scheduler.config)
        found.append(run(each, **{key: v() if callable(v) else v for key, v in arguments.items()}))
    assert found[0].shape == found[1].shape and np.array_equal(*found) and found[0].std() > 0.01


def test_without_a_seed_it_takes_torch_s_numbers_as_stock_does(pipe: LDMPipeline, img2img: Any) -> None:
    found = []
    for each in (pipe, img2img):
        torch.manual_seed(5)
        found.append(run(each, image=photo(), generator=None))
    assert np.array_equal(*found)


def test_the_shipped_model_changes_pictures_with_stock_s_bits() -> None:
    """It has latents of eight channels."""
    pipe = quiet(LDMPipeline.from_pretrained(road.ROOT / "models/emoji"))
    stock = quiet(diffusers.AutoPipelineForImage2Image.from_pipe(pipe, dtype=torch.float32))
    given = {"image": photo(64, 64), "strength": 0.6}
    assert np.array_equal(run(pipe, **given), run(stock, **given))


@pytest.mark.parametrize("name", ["pc", "ode", "heun", "ddim"])
def test_a_picture_that_is_hardly_noised_is_hardly_changed(name: str, tmp_path: Path) -> None:
    """Also by our own samplers: with an exact model, which here is the picture itself, the result is that picture."""
    pipe = tiny.pipeline(tmp_path)
    x0 = torch.randn(1, 4, 8, 8, generator=seeded())
    schedule = pipe.scheduler.alphas_cumprod

    def exact(x_t: torch.Tensor, t: torch.Tensor, **_: Any) -> tuple[torch.Tensor]:
        alpha_bar = schedule[int(t)] if name != "heun" else 1 / (1 + sigma_of(t) ** 2)
        return ((x_t - alpha_bar.sqrt() * x0) / (1 - alpha_bar).sqrt(),)

    def sigma_of(t: torch.Tensor) -> torch.Tensor:
        return ((1 - schedule[int(t)]) / schedule[int(t)]).sqrt()

    pipe.unet.forward = exact
    given = {"image": x0, "strength": 0.5, "guidance_scale": 1.0, "output_type": "latent", "num_inference_steps": 20}
    found = torch.from_numpy(run(pipe, "cat", sampler=name, **given))
    assert (found - x0).abs().max() < (0.5 if name == "pc" else 0.02)  # a step of Langevin dynamics leaves noise


# --- pictures come in through the one decoding path ------------------------------------------------------


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "1", "CMYK", "I;16"])
def test_pictures_of_any_mode(mode: str, pipe: LDMPipeline) -> None:
    if mode == "I;16":
        picture = Image.fromarray(array(photo(mode="L")).astype(np.uint16) * 257)
    else:
        picture = photo(mode="RGBA").convert("RGBA").convert(mode)
    found = run(pipe, image=picture, strength=0.5)
    assert np.array_equal(found, run(pipe, image=to_rgb(picture), strength=0.5)) and found.std() > 0.01


def test_a_camera_s_picture_is_turned(pipe: LDMPipeline) -> None:
    turned = Image.Exif()
    turned[0x0112] = 6
    buffer = io.BytesIO()
    photo(24, 16).save(buffer, "PNG", exif=turned)
    found = run(pipe, image=Image.open(buffer), strength=0.5)
    assert found.shape == (1, 24, 16, 3)
    assert np.array_equal(found, run(pipe, image=decode(buffer.getvalue()), strength=0.5))


def test_arrays_of_bytes_are_pictures(pipe: LDMPipeline) -> None:
    expected = run(pipe, image=photo())
    pixels = array(photo())
    for image in (pixels, [pixels], pixels[None], torch.from_numpy(pixels.copy()).permute(2, 0, 1)):
        assert np.array_equal(run(pipe, image=image), expected)


def test_height_and_width_resize_the_picture(pipe: LDMPipeline) -> None:
    resized = photo(30, 20).resize((16, 24), Image.Resampling.LANCZOS)
    assert np.array_equal(run(pipe, image=photo(30, 20), height=24, width=16), run(pipe, image=resized))


# --- inpainting ------------------------------------------------------------------------------------------


def check_kept(result: np.ndarray, source: Image.Image, mask: Image.Image) -> None:
    """Result [H,W,3] in [0,1] has the source's bits where the mask is black, and others elsewhere."""
    new = array(mask) >= 128
    assert np.array_equal(np.rint(result * 255).astype(np.uint8)[~new], array(source)[~new])
    assert np.abs(result * 255 - array(source))[~new].max() < 1e-4
    assert not np.array_equal(np.rint(result * 255)[new], array(source)[new])


@pytest.mark.parametrize("strength", [1.0, 0.7])
@pytest.mark.parametrize("name", STOCK)
def test_every_sampler_inpaints_with_stock_s_bits(name: str, strength: float, pipe: LDMPipeline, inpaint: Any) -> None:
    """Stock's latents; its pixels within the mask. Outside, ours has the picture's own, stock's are decoded."""
    kind, more = STOCK[name]
    inpaint.scheduler = getattr(diffusers, kind).from_config({**inpaint.scheduler.config, **more})
    given: dict[str, Any] = {"image": photo(), "mask_image": half(), "strength": strength, "height": 16, "width": 16}
    ours, stock = run(pipe, sampler=name, **given), run(inpaint, **given)
    assert np.array_equal(ours[:, :, 8:], stock[:, :, 8:])
    check_kept(ours[0], photo(), half())
    latents = [
        run(each, **given, output_type="latent", **more) for each, more in ((pipe, {"sampler": name}), (inpaint, {}))
    ]
    assert np.array_equal(*latents)


SPOT = Image.new("L", (16, 16))
SPOT.paste(255, (3, 5, 9, 12))  # on no border of latents
INPAINTED: dict[str, dict[str, Any]] = {
    "its own strength": {},
    "unguided": {"guidance_scale": 1.0},
    "a mask on no border of latents": {"mask_image": SPOT},
    "a gray mask": {"mask_image": photo(mode="L")},
    "a colored mask": {"mask_image": photo()},
    "timesteps": {"timesteps": [900, 600, 300, 100], "strength": 0.5},
    "another size": {"image": photo(40, 24), "mask_image": half(40, 24), "height": 16, "width": 32},
    "pictures and masks": {
        "prompt": ["red heart", "cat"], "image": [photo(), photo(seed=1)], "mask_image": [half(), SPOT],
        "generator": TWO,
    },
    "latents": {"latents": torch.randn(1, 4, 8, 8, generator=seeded(9))},
}  # fmt: skip


@pytest.mark.parametrize("name", INPAINTED)
def test_every_inpainting_has_stock_s_latents(name: str, pipe: LDMPipeline, inpaint: Any) -> None:
    arguments = {"image": photo(), "mask_image": half(), "height": 16, "width": 16, "output_type": "latent"}
    arguments |= INPAINTED[name]
    found = [run(each, **{key: v() if callable(v) else v for key, v in arguments.items()}) for each in (pipe, inpaint)]
    assert np.array_equal(*found) and found[0].std() > 0.01


def test_eight_channels_are_inpainted_by_the_same_equations(tmp_path: Path) -> None:
    """Stock refuses them. A loop by hand: DDIM (Song et al. 2021, eq. 12), x_{t-1} = new or known under noise."""
    pipe = tiny.pipeline(tmp_path, vae_config=VAEConfig(channels=(16, 32), layers=1, latent_channels=8))
    pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config)
    found = pipe(
        "cat", image=photo(), mask_image=half(), seed=3, num_inference_steps=5, guidance_scale=1.0, output_type="latent"
    ).images
    generator = seeded()
    with torch.no_grad():
        pixels = torch.from_numpy(array(photo()).copy()).permute(2, 0, 1)[None] / 127.5 - 1
        posterior = pipe.vae.encode(pixels).latent_dist
        known = posterior.mean + posterior.std * torch.randn(1, 8, 8, 8, generator=generator)
        noise = torch.randn(1, 8, 8, 8, generator=generator)
        context = pipe.encode_prompt("cat", "cpu", 1, False)[0]
        x, times = noise, pipe.scheduler.timesteps.tolist()
        for t, following in zip(times, [*times[1:], None], strict=True):
            a = pipe.scheduler.alphas_cumprod[t]
            b = pipe.scheduler.final_alpha_cumprod if following is None else pipe.scheduler.alphas_cumprod[following]
            eps = pipe.unet(x, t, encoder_hidden_states=context).sample
            x = b.sqrt() * (x - (1 - a).sqrt() * eps) / a.sqrt() + (1 - b).sqrt() * eps
            x[..., :4] = (b.sqrt() * known + (1 - b).sqrt() * noise)[..., :4]
    assert (found - x).abs().max() < 1e-4
    (picture,) = pipe("cat", image=photo(), mask_image=half(), seed=3, num_inference_steps=5).images
    check_kept(array(picture) / 255, photo(), half())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_kept_is_the_picture_s_own_to_the_bit(dtype: torch.dtype, tiny_pipeline_folder: Path) -> None:
    pipe = quiet(LDMPipeline.from_pretrained(tiny_pipeline_folder, dtype=dtype))
    for mask in (half(), SPOT):
        given: dict[str, Any] = {"image": photo(), "mask_image": mask, "num_inference_steps": 3, "seed": 1}
        (picture,) = pipe("cat", **given).images
        check_kept(array(picture) / 255, photo(), mask)
        check_kept(pipe("cat", **given, output_type="np").images[0], photo(), mask)
        check_kept(pipe("cat", **given, output_type="pt").images[0].permute(1, 2, 0).numpy(), photo(), mask)


@pytest.mark.parametrize("mode", ["L", "1", "RGBA", "I;16"])
def test_masks_of_any_mode_and_kind(mode: str, pipe: LDMPipeline) -> None:
    """What is transparent in a mask is kept."""
    wide = Image.fromarray(array(half()).astype(np.uint16) * 257)
    mask = wide if mode == "I;16" else half().convert(mode)
    if mode == "RGBA":
        mask.paste((255, 255, 255, 0), (0, 0, 8, 16))
    expected = run(pipe, image=photo(), mask_image=half())
    assert np.array_equal(run(pipe, image=photo(), mask_image=mask), expected)
    new = array(half()) > 0
    for values in (new, new.astype(np.float32), array(half()), torch.from_numpy(new)[None, None], [half()]):
        assert np.array_equal(run(pipe, image=photo(), mask_image=values), expected)


def test_an_edited_picture_depends_on_its_own_seed_and_not_on_its_batch(pipe: LDMPipeline) -> None:
    for more in ({}, {"mask_image": half()}):
        given = {"image": photo(), "strength": 0.8, "sampler": "euler-a", **more}
        many = run(pipe, num_images_per_prompt=3, seed=5, **given)
        for i in range(3):
            assert np.abs(many[i] - run(pipe, seed=5 + i, **given)[0]).max() < 1e-4
        assert np.abs(many[0] - many[1]).max() > 0.01


def test_each_prompt_s_copies_are_of_its_own_picture(pipe: LDMPipeline) -> None:
    """Stock takes the pictures in turn: a picture of the first prompt would be an edit of the second picture."""
    pictures = [photo(), photo(seed=1)]
    many = run(pipe, ["cat", "pizza"], image=pictures, num_images_per_prompt=2, seed=5, strength=0.4)
    for i in range(4):
        alone = run(pipe, ["cat", "pizza"][i // 2], image=pictures[i // 2], seed=5 + i, strength=0.4)
        assert np.abs(many[i] - alone[0]).max() < 1e-4


# --- outpainting -----------------------------------------------------------------------------------------


def test_expanding_is_inpainting_of_a_canvas_that_continues_the_edges(pipe: LDMPipeline) -> None:
    left, top, right, bottom = 8, 4, 2, 6
    found = run(pipe, image=photo(), expand=(left, top, right, bottom))
    canvas = Image.fromarray(np.pad(array(photo()), ((top, bottom), (left, right), (0, 0)), mode="edge"))
    mask = Image.new("L", canvas.size, 255)
    mask.paste(0, (left, top, left + 16, top + 16))
    assert found.shape == (1, 16 + top + bottom, 16 + left + right, 3)
    assert np.array_equal(found, run(pipe, image=canvas, mask_image=mask))
    check_kept(found[0], canvas, mask)


def test_expanding_and_a_mask_together(pipe: LDMPipeline) -> None:
    found = run(pipe, image=photo(), mask_image=half(), expand=(0, 0, 8, 0))
    expected = run(pipe, image=np.pad(array(photo()), ((0, 0), (0, 8), (0, 0)), mode="edge"), mask_image=torch_mask())
    assert np.array_equal(found, expected)


def torch_mask() -> torch.Tensor:
    return pad(torch.from_numpy(array(half()) > 0), (0, 8), value=True)


# --- other models and engines ----------------------------------------------------------------------------


def test_a_model_that_takes_a_second_picture(tmp_path: Path) -> None:
    pipe = quiet(tiny.condition_pipeline(tmp_path))
    given = {"image": photo(), "mask_image": half(), "condition": photo(seed=1)}
    found = run(pipe, **given)
    check_kept(found[0], photo(), half())
    assert not np.array_equal(found, run(pipe, **{**given, "condition": photo(seed=2)}))


def test_a_model_of_classes(tmp_path: Path) -> None:
    pipe = quiet(tiny.class_pipeline(tmp_path, ("food", "flags")))
    found = [run(pipe, None, image=photo(), class_label=name, strength=0.6) for name in ("food", "flags")]
    assert not np.array_equal(*found)


def test_u_nets_of_upscalers_are_refused(tmp_path: Path) -> None:
    pipe = tiny.pipeline(tmp_path)
    unet = build_unet(
        UNetConfig(channels=(32, 64), attention=(False, True), layers=1, head_channels=16),
        latent_shape=(4, 8, 8), context_dim=32, condition_channels=3,
    )  # fmt: skip
    pipe.register_modules(unet=unet.eval())
    with pytest.raises(ValueError, match="image: this model's U-Net takes 3 channels beside those of the latents"):
        pipe("cat", image=photo())


def test_openvino_changes_pictures_within_rounding(tiny_pipeline_folder: Path) -> None:
    pytest.importorskip("openvino")
    pipe = quiet(LDMPipeline.from_pretrained(tiny_pipeline_folder))
    for given in ({"strength": 0.7}, {"mask_image": half()}):
        plain = run(pipe, image=photo(), **given)
        pipe.enable_openvino()
        assert 0 < np.abs(run(pipe, image=photo(), **given) - plain).max() < 1 / 255
        pipe.disable_openvino()


# --- what cannot work ------------------------------------------------------------------------------------

MASKED: dict[str, Any] = {"image": photo(), "mask_image": half()}
THIN = Image.new("L", (16, 16))
THIN.paste(255, (3, 0, 4, 16))
BAD: list[tuple[dict[str, Any], str]] = [
    ({"mask_image": half()}, "mask_image: there is no picture to change; give it as image"),
    ({"strength": 0.5}, "strength: there is no picture to change"),
    ({"expand": (8, 0, 0, 0)}, "expand: there is no picture to change"),
    ({"image": photo(), "strength": 1.5}, "strength: expected a number from 0 to 1, got 1.5"),
    ({"image": photo(), "strength": float("nan")}, "strength: expected a number from 0 to 1, got nan"),
    ({"image": photo(), "strength": 0}, "strength: 0 of 5 steps is less than one step; expected 0.2 to 1"),
    ({"image": photo(), "strength": 0.19}, "strength: 0.19 of 5 steps is less than one step; expected 0.2 to 1"),
    ({"image": photo(), "timesteps": [9, 5], "strength": 0.4}, "strength: 0.4 of 2 steps is less than one step"),
    ({"image": photo(), "sampler": "heun", "timesteps": [900, 600, 300], "strength": 0.5}, "strength: 0.5 leaves"),
    ({"image": "a.png"}, "image: expected a PIL picture, an array, a tensor or a list, got str"),
    ({"image": photo(), "num_inference_steps": 0}, "num_inference_steps: expected a whole number from 1 to"),
    ({"image": photo(), "num_inference_steps": "4"}, "num_inference_steps: expected a whole number from 1 to"),
    ({"image": []}, "image: expected at least one picture, got an empty list"),
    ({"image": photo(1, 16)}, "image: expected at least 2 x 2 pixels, got 1 x 16"),
    ({"image": photo(2, 16)}, "image: expected edges from 4 to 4096 pixels, got 2 x 16"),
    ({"image": photo(4100, 4)}, "image: expected edges from 4 to 4096 pixels, got 4100 x 4"),
    ({"image": [photo(), photo(24, 16)]}, "image: expected pictures of one size, got 16 x 16 and 24 x 16; give height"),
    ({"image": [photo()] * 3, "prompt": ["a", "b"]}, "prompt: expected 1 or 3"),
    ({"image": [photo()] * 2, "prompt": ["a"] * 4}, "image: expected 1 or 4, one for each prompt, got 2"),
    ({"image": np.zeros((16, 16))}, r"image: expected \[H,W,3\] or \[B,H,W,3\], got \[16, 16\]"),
    ({"image": torch.zeros(16, 16, 3)}, r"image: expected \[3,H,W\] or \[B,3,H,W\], got \[16, 16, 3\]"),
    ({"image": ARRAY[0] * 2 - 1}, r"image: expected uint8, or floats in \[0, 1\]"),
    ({"image": ARRAY[0] * np.nan}, r"image: expected uint8, or floats in \[0, 1\]"),
    ({"image": photo(), "height": 20}, "height: expected a multiple of 8"),
    ({**MASKED, "mask_image": half(8, 16)}, "mask_image: expected the size of the picture, 16 x 16, got 8 x 16"),
    ({**MASKED, "mask_image": Image.new("L", (16, 16))}, "mask_image: it is all black, so nothing would be new"),
    ({**MASKED, "mask_image": THIN}, "mask_image: it is thinner than a latent, so nothing would be new"),
    ({**MASKED, "mask_image": "m.png"}, "mask_image: expected a PIL picture, an array or a tensor, got str"),
    ({**MASKED, "mask_image": ARRAY[0]}, r"mask_image: expected \[H,W\], got \[16, 16, 3\]"),
    ({**MASKED, "mask_image": [half()] * 2}, r"mask_image: expected one for all or one per picture \(1\), got 2"),
    ({"image": photo(17, 16), "mask_image": half(17, 16)}, "image: to keep a part .* multiples of 2, got 17 x 16"),
    ({**MASKED, "image": torch.zeros(1, 4, 8, 8)}, "image: expected pixels, not latents, with mask_image or expand"),
    ({"image": photo(), "expand": (3, 0, 0, 0)}, "expand: expected multiples of 2, got 3; 2 or 4 fits"),
    ({"image": photo(), "expand": 8}, r"expand: expected pixels to add \(left, top, right, bottom\), got 8"),
    ({"image": photo(), "expand": (0, 0, 0, 0)}, "expand: expected pixels to add"),
    ({"image": photo(), "expand": (-2, 0, 0, 0)}, "expand: expected pixels to add"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=[str(i) for i in range(len(BAD))])
def test_what_cannot_work_is_named_before_the_picture_is_read(
    arguments: dict[str, Any], message: str, pipe: LDMPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    for network in (pipe.unet, pipe.vae.encoder):
        monkeypatch.setattr(network, "forward", lambda *_, **__: pytest.fail("a network ran"))
    with pytest.raises(ValueError, match="^" + message):
        run(pipe, **{"prompt": "red heart", **arguments})
