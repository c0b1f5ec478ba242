"""The VAE's latents: measured, folded into stock weights, and decoded as before."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from torch import Tensor

from ldm.models.vae import (
    PIXELS_AT_ONCE,
    Posterior,
    VAEConfig,
    at_once,
    build_vae,
    decode,
    downsampling,
    encode,
    load_vae,
    measure,
    normalize,
    psnr,
    to_pictures,
)

CONFIG = VAEConfig(channels=(16, 32), layers=1, latent_channels=4)


def skewed(vae: Any) -> Any:
    """The VAE with latents of other means, scales and posterior widths per channel, as training leaves them."""
    last = vae.quant_conv if getattr(vae, "quant_conv", None) is not None else vae.encoder.conv_out
    scale = torch.tensor([0.3, 1.0, 4.0, 11.0])
    last.weight.data[:4] *= scale.reshape(-1, 1, 1, 1)
    last.bias.data = torch.cat([torch.tensor([5.0, -0.2, 0.0, -30.0]), torch.tensor([-9.0, -3.0, -1.0, 2.0])])
    return vae.eval().requires_grad_(False)


def build(kind: str) -> Any:
    torch.manual_seed(0)
    if kind == "kl":
        return skewed(build_vae(CONFIG))
    if kind == "kl of Stable Diffusion's scaling":
        vae = skewed(build_vae(CONFIG))
        vae.register_to_config(scaling_factor=0.18215)
        return vae
    if kind == "kl without quant convolutions":
        built = build_vae(CONFIG)
        config = {**built.config, "use_quant_conv": False, "use_post_quant_conv": False, "scaling_factor": 0.7}
        return skewed(diffusers.AutoencoderKL.from_config(config))
    widths = {"encoder_block_out_channels": (16, 16), "decoder_block_out_channels": (16, 16)}
    blocks = {"num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1)}
    return diffusers.AutoencoderTiny(**widths, **blocks).eval().requires_grad_(False)


FOLDED = ["kl", "kl of Stable Diffusion's scaling"]
SCALED = ["kl without quant convolutions", "tiny"]


@pytest.fixture(scope="module")
def pixels() -> Tensor:
    """Smooth random pictures [24,3,16,16]."""
    torch.manual_seed(3)
    coarse = torch.rand(24, 3, 4, 4) * 2 - 1
    return torch.nn.functional.interpolate(coarse, size=16, mode="bilinear").clamp(-1, 1)


def by_channel(latents: Tensor) -> np.ndarray:
    """[B,C,h,w] => float64 [C, B*h*w]."""
    return latents.double().transpose(0, 1).flatten(1).numpy()


# --- normalize -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FOLDED)
def test_after_folding_every_channel_has_mean_0_and_std_1_and_pictures_decode_as_before(
    kind: str, pixels: Tensor
) -> None:
    vae = build(kind)
    before = encode(vae, pixels)
    mean, std = measure([before])
    decoded = decode(vae, before.mean)
    normalize(vae, mean, std)

    after = encode(vae, pixels)
    samples = np.stack([by_channel(after.sample(torch.randn_like(after.std))) for _ in range(200)])
    np.testing.assert_allclose(samples.mean((0, 2)), 0, atol=0.01)
    np.testing.assert_allclose(samples.std((0, 2)), 1, atol=0.01)
    # the same statement without sampling error
    found_mean, found_std = measure([after])
    np.testing.assert_allclose(found_mean.numpy(), 0, atol=1e-5)
    np.testing.assert_allclose(found_std.numpy(), 1, atol=1e-5)
    # the posterior moved and stretched as a whole
    shape = (1, -1, 1, 1)
    expected_mean, expected_std = (
        (before.mean - mean.reshape(shape)) / std.reshape(shape),
        before.std / std.reshape(shape),
    )
    assert (after.mean - expected_mean).norm() / expected_mean.norm() < 1e-5
    assert (after.std - expected_std).norm() / expected_std.norm() < 1e-5
    assert (decode(vae, after.mean) - decoded).norm() / decoded.norm() < 1e-5
    assert vae.config.scaling_factor == 1.0
    assert decoded.std() > 0.01, "a flat picture proves nothing"


@pytest.mark.parametrize("kind", SCALED)
def test_a_vae_without_quant_convolutions_gets_an_overall_std_of_1(kind: str, pixels: Tensor) -> None:
    vae = build(kind)
    before = encode(vae, pixels)
    decoded = decode(vae, before.mean)
    normalize(vae, *measure([before]))
    after = encode(vae, pixels)
    within = by_channel(after.sample(torch.randn_like(after.std))).std(1)
    assert math.sqrt((within**2).mean()) == pytest.approx(1, abs=0.02)
    assert math.sqrt(float(measure([after])[1].square().mean())) == pytest.approx(1, abs=1e-5)
    assert (decode(vae, after.mean) - decoded).norm() / decoded.norm() < 1e-5


@pytest.mark.parametrize("kind", FOLDED + SCALED)
def test_normalizing_twice_changes_nothing_more(kind: str, pixels: Tensor) -> None:
    vae = build(kind)
    normalize(vae, *measure([encode(vae, pixels)]))
    once = encode(vae, pixels).mean
    normalize(vae, *measure([encode(vae, pixels)]))
    assert (encode(vae, pixels).mean - once).norm() / once.norm() < 1e-5


@pytest.mark.parametrize("kind", FOLDED + SCALED)
def test_stock_code_decodes_the_same_picture(kind: str, pixels: Tensor, tmp_path: Path) -> None:
    vae = build(kind)
    normalize(vae, *measure([encode(vae, pixels)]))
    latents = encode(vae, pixels).mean
    vae.save_pretrained(tmp_path)
    stock = type(vae).from_pretrained(tmp_path, use_safetensors=True).eval()
    with torch.no_grad():
        # StableDiffusionPipeline's own line
        picture = stock.decode(latents / stock.config.scaling_factor, return_dict=False)[0].clamp(-1, 1)
        encoded = stock.encode(pixels)
        stock_latents = encoded.latents if kind == "tiny" else encoded.latent_dist.mode()
    assert (decode(vae, latents) - picture).abs().max() == 0
    assert (stock_latents * stock.config.scaling_factor - latents).abs().max() < 1e-6


def test_a_collapsed_channel_is_an_error() -> None:
    with pytest.raises(ValueError, match="a latent channel is constant"):
        normalize(build("kl"), torch.zeros(4), torch.tensor([1.0, 0.0, 1.0, 1.0]))


# --- measure and posterior -----------------------------------------------------------------------------


def test_measure_agrees_with_numpy_on_sampled_latents() -> None:
    rng = np.random.default_rng(0)
    means = rng.normal([0.5, -2, 40], [1, 0.1, 3], size=(4, 5, 6, 6, 3))
    stds = rng.uniform(0.5, 1.5, size=means.shape) * [1, 0.2, 0.01]
    batches = [
        (torch.tensor(m).permute(0, 3, 1, 2), torch.tensor(s).permute(0, 3, 1, 2))
        for m, s in zip(means, stds, strict=True)
    ]
    mean, std = measure(Posterior(m, s) for m, s in batches)
    samples = (means + stds * rng.normal(size=(2000, *means.shape))).reshape(-1, 3)
    np.testing.assert_allclose(mean.numpy(), samples.mean(0), atol=5e-3)
    np.testing.assert_allclose(std.numpy(), samples.std(0), rtol=2e-3)


def test_measure_needs_latents() -> None:
    with pytest.raises(ValueError, match="no latents to measure"):
        measure([])


def test_a_posterior_sample_has_its_moments() -> None:
    torch.manual_seed(0)
    mean, std = torch.randn(1, 4, 2, 2), torch.rand(1, 4, 2, 2) + 0.1
    draws = Posterior(mean, std).sample(torch.randn(40000, 4, 2, 2))
    assert ((draws.mean(0) - mean[0]) / std[0]).abs().max() < 0.025  # five standard errors
    assert (draws.std(0) / std[0] - 1).abs().max() < 0.02


def test_encode_reports_what_diffusers_samples_from(pixels: Tensor) -> None:
    vae = build("kl of Stable Diffusion's scaling")
    noise = torch.randn(24, 4, 8, 8, generator=torch.Generator().manual_seed(4))
    sampled = vae.encode(pixels).latent_dist.sample(torch.Generator().manual_seed(4)) * 0.18215
    assert (encode(vae, pixels).sample(noise) - sampled).abs().max() < 1e-5


def test_the_tiny_autoencoder_has_no_spread(pixels: Tensor) -> None:
    assert encode(build("tiny"), pixels).std.abs().max() == 0


@pytest.mark.parametrize("channels", [(16, 32), (8, 16, 16, 24), (40, 64), (7, 21)])
def test_latents_are_as_much_smaller_as_downsampling_says(channels: tuple[int, ...]) -> None:
    vae = build_vae(VAEConfig(channels=channels, latent_channels=3))
    assert downsampling(vae) == 2 ** (len(channels) - 1)
    with torch.no_grad():
        latents = encode(vae, torch.zeros(1, 3, 32, 16)).mean
        assert latents.shape == (1, 3, 32 // downsampling(vae), 16 // downsampling(vae))
        assert decode(vae, latents).shape == (1, 3, 32, 16)


def test_a_vae_needs_a_width() -> None:
    with pytest.raises(ValueError, match=r"vae_model.channels: expected at least one positive width, got \[\]"):
        VAEConfig(channels=())


# --- pictures ------------------------------------------------------------------------------------------


def test_pictures_hold_the_nearest_of_256_levels() -> None:
    ramp = torch.linspace(-1.2, 1.2, 300).reshape(1, 1, 10, 30).expand(1, 3, 10, 30)
    picture = to_pictures(ramp)[0]
    expected = np.rint((np.clip(ramp[0, 0].numpy().astype(np.float64), -1, 1) + 1) / 2 * 255)
    found = np.asarray(picture)[..., 0]
    assert picture.mode == "RGB"
    assert picture.size == (30, 10)
    assert np.abs(found - expected).max() == 0
    # every 8-bit picture survives the way to pixels and back
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    back = to_pictures(torch.tensor(levels / 127.5 - 1).float().expand(1, 3, 16, 16))[0]
    assert np.abs(np.asarray(back)[..., 0].astype(int) - levels).max() == 0


def test_psnr_is_that_of_8_bit_pictures() -> None:
    rng = np.random.default_rng(1)
    one, other = rng.uniform(-1, 1, size=(2, 3, 3, 8, 8))
    # 10 log10(MAX^2 / MSE) on the scale of 0 to 255
    mse = ((one - other) * 127.5).__pow__(2).mean((1, 2, 3))
    np.testing.assert_allclose(
        psnr(torch.tensor(one), torch.tensor(other)).numpy(), 10 * np.log10(255**2 / mse), rtol=1e-6
    )
    black, gray = torch.full((1, 3, 4, 4), -1.0), torch.full((1, 3, 4, 4), 1 / 127.5 - 1)
    assert float(psnr(gray, black)) == pytest.approx(20 * math.log10(255), abs=1e-3)  # one level off everywhere
    assert math.isfinite(float(psnr(black, black)))


# --- loading -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FOLDED + SCALED)
def test_a_saved_vae_loads_frozen_from_its_folder_and_from_a_pipelines(
    kind: str, tmp_path: Path, pixels: Tensor
) -> None:
    vae = build(kind)
    vae.save_pretrained(tmp_path / "pipeline" / "vae")
    for name in (tmp_path / "pipeline" / "vae", tmp_path / "pipeline", str(tmp_path / "pipeline")):
        loaded = load_vae(name)
        assert type(loaded) is type(vae)
        assert not loaded.training
        assert not any(parameter.requires_grad for parameter in loaded.parameters())
        assert (encode(loaded, pixels).mean - encode(vae, pixels).mean).abs().max() == 0


def test_another_class_is_refused(tmp_path: Path) -> None:
    diffusers.VQModel(block_out_channels=(32,), norm_num_groups=8).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is a VQModel; expected AutoencoderKL or AutoencoderTiny"):
        load_vae(tmp_path)


def test_a_missing_folder_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="nowhere"):
        load_vae(tmp_path / "nowhere")


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    vae = build("kl")
    vae.save_pretrained(tmp_path)
    (tmp_path / "diffusion_pytorch_model.safetensors").unlink()
    torch.save(vae.state_dict(), tmp_path / "diffusion_pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        load_vae(tmp_path)


@pytest.mark.parametrize("kind", [*FOLDED, *SCALED])
def test_many_pictures_go_through_a_few_at_a_time_and_come_out_as_from_all_at_once(kind: str) -> None:
    vae = build(kind)
    pixels = torch.rand(20, 3, 64, 64, generator=torch.Generator().manual_seed(1)) * 2 - 1
    sizes: list[int] = []
    for part in (vae.encoder, vae.decoder):
        part.register_forward_pre_hook(lambda _, given: sizes.append(len(given[0])))
    with torch.no_grad():
        posterior = encode(vae, pixels)
        drawn = decode(vae, posterior.mean)
        assert sizes == [8, 8, 4] * 2  # 8 pictures of 64 x 64 are 2^15 pixels
        encoded, scale = vae.encode(pixels), vae.config.scaling_factor
        mean = encoded.latent_dist.mean if hasattr(encoded, "latent_dist") else encoded.latents
        whole = vae.decode(mean).sample.clamp(-1, 1)
    assert torch.allclose(posterior.mean, mean * scale, rtol=1e-4, atol=1e-4)
    assert torch.allclose(drawn, whole, rtol=1e-4, atol=1e-3)


def test_a_picture_larger_than_what_goes_at_once_goes_alone() -> None:
    vae = build("kl")
    assert (at_once(vae, 64, 64), at_once(vae, 128, 128), at_once(vae, 256, 256)) == (8, 2, 1)
    assert at_once(vae, 32, 8) == PIXELS_AT_ONCE // 256
    assert at_once(vae.to("meta"), 256, 256) == 8  # as for any device that is no CPU
