"""Training an upscaler: crops and noise by (seed, n), what stock feeds its U-Net, the base's versions, and a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import road
import tiny
import torch
from diffusers import DDPMScheduler, StableDiffusionUpscalePipeline
from PIL import Image

from ldm.data.batches import load_pixels
from ldm.data.numbers import Numbers
from ldm.models.vae import VAEConfig, build_vae, decode, encode, load_vae, to_pictures
from ldm.pipelines.text_to_image import LDMPipeline
from ldm.pipelines.upscale import LDMUpscalePipeline
from ldm.training.config import Config
from ldm.training.doctor.examine import examine
from ldm.training.randomness import generator
from ldm.training.run import train
from ldm.training.small_pictures import STEPS, Base, small_kind
from ldm.training.tasks.upscaling import Upscaling

SIZE = 2 * tiny.SIZE  # of the large pictures


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Large pictures, a model of pictures half as large, a VAE and a text encoder."""
    folder = tmp_path_factory.mktemp("upscaling")
    road.draw_folder(folder / "data", SIZE)
    tiny.pipeline(folder / "encoder").save_pretrained(folder / "base")
    tiny.save_text_encoder(folder / "text", "bert")
    torch.manual_seed(0)
    build_vae(VAEConfig(channels=(16, 16), layers=1)).save_pretrained(folder / "vae")
    return folder


def config_of(home: Path, run: Path, **words: Any) -> Config:
    given = {
        "run": str(run), "vae": str(home / "vae"), "data__size": SIZE, "upscale__factor": 2, "upscale__crop": 8,
        "upscale__base": str(home / "base"), "loop__steps": 4, "loop__evaluation_pictures": 4, **words,
    }  # fmt: skip
    return road.recipe(home, **given)


@pytest.fixture(scope="module")
def task(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A prepared task, with mirrored pictures."""
    from test_initial_model import built

    made = built(config_of(home, tmp_path_factory.mktemp("task"), data__flip="true"), Upscaling)
    made.prepare()
    return made


# --- samples -----------------------------------------------------------------------------------------


def test_a_sample_is_a_crop_of_the_latents_and_the_same_crop_of_the_noised_small_picture(task: Any, home: Path) -> None:
    """By the stock scheduler, from the picture's file; latents and small pixels are of one place."""
    samples, whole = task.samples, SIZE // 2
    scheduler, found = DDPMScheduler(), set()
    for n in range(24):
        sample, drawn = samples[n], samples.draw(n)
        rng = generator(0, "upscale", n)
        own = float(torch.rand((), generator=rng, dtype=torch.float64)) < 0.5
        level = int(torch.randint(351, (), generator=rng))
        noise = torch.randn(3, 4, 4, generator=rng)
        left, top = (int(place * (whole - 3)) for place in drawn.crop)
        row = samples.pictures[drawn.row]
        assert sample["class"] == level and sample["channels"].shape == (3, 4, 4) == (3, *sample["eps"].shape[1:])
        mean, std = samples.cache.posterior(drawn.row, drawn.flip)
        for name, tensor in (("mean", mean), ("std", std)):
            assert torch.equal(sample[name], tensor[:, top : top + 4, left : left + 4])
        if not own:
            small = load_pixels(row, whole, flip=drawn.flip)[:, top : top + 4, left : left + 4]
            expected = scheduler.add_noise(small[None], noise[None], torch.tensor([level]))[0]
            torch.testing.assert_close(sample["channels"], expected, rtol=1e-5, atol=1e-6)
        found.add((left, top, own, drawn.flip))
    assert len(found) > 20 and {own for *_, own, _ in found} == {True, False}
    again = samples[3]
    assert all(torch.equal(again[name], samples[3][name]) for name in ("mean", "channels", "eps"))


def test_some_small_pictures_have_been_through_the_base(task: Any, home: Path) -> None:
    """Version 1 is the base's VAE, or image-to-image with its prompt, by strength and noise of (seed, picture)."""
    small, rows = task.samples.crops.small, task.source.train.pictures
    base: Any = LDMPipeline.from_pretrained(home / "base")
    base.set_progress_bar_config(disable=True)
    taken = []
    for number in range(8):
        truth = load_pixels(rows[number], tiny.SIZE)
        assert torch.allclose(small.pixels(number, 0, False), truth, atol=1e-6)
        rng = generator(0, "base", rows[number].content.hex())
        steps, seed = int(torch.randint(4, (), generator=rng)), int(torch.randint(2**62, (), generator=rng))
        if steps:
            words = {"num_inference_steps": STEPS, "guidance_scale": 3.0, "output_type": "pt"}
            picture = (truth[None] + 1) / 2
            made = base(rows[number].captions[0], image=picture, strength=(steps + 0.5) / STEPS, seed=seed, **words)
            expected = made.images[0] * 2 - 1
        else:
            with torch.no_grad():
                (expected,) = decode(base.vae, encode(base.vae, truth[None]).mean)
        found = small.pixels(number, 1, False)
        assert float((found - expected).abs().max()) < 2.5 / 127.5  # 8 bits, and batches of another size
        assert torch.equal(small.pixels(number, 1, True), found.flip(-1))
        assert float((found - truth).abs().mean()) > 0.05
        taken.append(steps)
    assert len(set(taken)) > 2


def test_without_the_cache_a_sample_is_the_crop_of_the_picture(task: Any) -> None:
    """As the trial before the first step reads them: of the same place, with the same noise."""
    trial = task.latent_samples()
    for n in range(6):
        cached, sample = task.samples[n], trial[n]
        drawn = trial.draw(n)
        left, top = (int(place * (SIZE // 2 - 3)) for place in drawn.crop)
        whole = load_pixels(trial.pictures[drawn.row], SIZE, flip=drawn.flip)
        assert torch.equal(sample["pixels"], whole[:, 2 * top : 2 * top + 8, 2 * left : 2 * left + 8])
        assert sample["class"] == cached["class"] and torch.equal(sample["eps"], cached["eps"])


def test_validation_shows_whole_held_out_pictures_at_fixed_levels(task: Any) -> None:
    (true,) = (one.true for one in task.heldout)
    assert true.x0.shape == (4, 4, 16, 16) and true.conditioning.channels.shape == (4, 3, 16, 16)
    assert len(set(true.conditioning.class_labels.tolist())) > 1
    again = task.validation_sets()[0].true.conditioning
    assert torch.equal(again.channels, true.conditioning.channels)


# --- a run -------------------------------------------------------------------------------------------


def test_a_run_leaves_stock_s_folder_whose_vae_decodes_what_it_learned(home: Path, tmp_path: Path) -> None:
    words = {"loop__steps": 4, "loop__log_every": 1, "loop__evaluate_every": 2, "optim__ema_decay": 0.5,
             "loop__sample_every": 4, "loop__checkpoint_every": 4, "loop__num_inference_steps": 3,
             "upscale__base": "null"}  # fmt: skip
    losses = train("ldm", config_of(home, tmp_path / "run", **words))
    heldout = list(road.logged(tmp_path / "run", "ldm/heldout/total").values())
    assert np.isfinite(losses).all() and heldout[-1] < heldout[0]
    with Image.open(tmp_path / "run/samples/step_0000004.png") as grid:
        assert grid.height > grid.width / 3  # three rows: small, upscaled, true

    small = to_pictures(load_pixels_of(home)[None])[0]
    given: dict[str, Any] = {"image": small, "num_inference_steps": 2, "noise_level": 20, "output_type": "np"}
    found = []
    for kind in (LDMUpscalePipeline, StableDiffusionUpscalePipeline):
        pipe: Any = kind.from_pretrained(tmp_path / "run/pipeline")
        assert (pipe.config.max_noise_level, pipe.unet.config.num_class_embeds) == (350, 351)
        for scale in (1.0, 2.0):
            rng = torch.Generator().manual_seed(1)
            found.append(pipe("red heart", guidance_scale=scale, generator=rng, **given).images)
    assert np.array_equal(found[0], found[2]) and np.array_equal(found[1], found[3])
    assert LDMUpscalePipeline.from_pretrained(tmp_path / "run/pipeline").defaults.num_inference_steps == 3
    assert pipe.vae.config.scaling_factor == 0.08333
    frozen = load_vae(tmp_path / "run/pipeline")
    pixels = torch.rand(1, 3, SIZE, SIZE) * 2 - 1
    with torch.no_grad():
        measured = encode(frozen, pixels).mean.std()
    assert 0.1 < float(measured) < 10  # latents of about unit variance, scaled by 0.08333


def test_the_doctor_looks_at_the_upscaler(home: Path, tmp_path: Path) -> None:
    """Not at a model of pictures: the first thing that is tried out has the small pictures in its needs."""
    disk = next(found for found in examine(config_of(home, tmp_path / "run")) if found.check.endswith(" disk"))
    assert disk.check == "upscaler disk" and disk.state == "ok"
    words = {"upscale__base": str(tmp_path / "nothere")}
    *_, last = examine(config_of(home, tmp_path / "run", **words))
    assert last.state == "problem" and last.message.startswith("upscale.base: ")


def load_pixels_of(home: Path) -> torch.Tensor:
    with Image.open(home / "data/images/red_heart.png") as picture:
        array = np.asarray(picture.convert("RGB").resize((tiny.SIZE, tiny.SIZE)))
    return torch.from_numpy(array.copy()).permute(2, 0, 1) / 127.5 - 1


def test_a_changed_base_is_another_one_for_checkpoints_and_stores(task: Any, home: Path, tmp_path: Path) -> None:
    """What resume compares and what the store of small pictures is named after; neither needs the weights in memory."""
    other = tiny.pipeline(tmp_path / "encoder")
    with torch.no_grad():
        other.unet.conv_out.bias += 1
    other.save_pretrained(tmp_path / "other")
    config = config_of(home, tmp_path / "run", upscale__base=str(tmp_path / "other"))
    changed = Base(config, torch.device("cpu"), torch.float32)
    assert "pipeline" not in changed.__dict__
    assert task.frozen_facts()["upscale_base"] == task.base.sha256[:16] != changed.sha256[:16]
    kinds = [small_kind(config, base) for base in (None, task.base, changed)]
    assert len({kind.file for kind in kinds}) == 3 and [kind.shape[0] for kind in kinds] == [1, 2, 2]


# --- refusals ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"init": "base"}, "init: an upscaler begins with random weights"),
        ({"data__inpaint": "true"}, "data.inpaint: what follows x_t is the small picture; set it to false"),
        ({"data__label_column": "color"}, "data.label_column: an upscaler's class is its noise level; leave it out"),
        (
            {"data__number_columns": ["size"]},
            "data.number_columns: an upscaler's class is its noise level; leave it out",
        ),
        ({"optim__ema_widths": [0.1]}, "optim.ema_widths: an upscaler has one average, of ema_decay; set it to []"),
        ({"data__cache": "off"}, "data.cache: an upscaler learns from crops of latents that are kept"),
        ({"loop__half_size_steps": 2}, "loop.half_size_steps: an upscaler learns from crops anyway"),
        ({"upscale__crop": 6}, "upscale.crop: expected a multiple of 4, as the U-Net's levels need"),
        (
            {"upscale__crop": 64},
            "upscale.crop: expected a multiple of 4, as the U-Net's levels need, up to data.size=32",
        ),
        ({"upscale__factor": 3}, "upscale.factor: expected one of 0, 2, 4, 8, got 3"),
        ({"upscale__factor": 0}, "upscale.base: only an upscaler has one"),
    ],
)
def test_settings_that_no_upscaler_has_are_one_line(
    words: dict[str, Any], message: str, home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        config_of(home, tmp_path, **words)
    assert message in capsys.readouterr().err


def test_a_vae_or_a_base_that_does_not_fit_is_refused_before_anything_runs(home: Path, tmp_path: Path) -> None:
    def refused(message: str, **words: Any) -> None:
        with pytest.raises((ValueError, OSError), match=message) as raised:
            train("ldm", config_of(home, tmp_path / "run", **words))
        assert "\n" not in str(raised.value)

    refused("upscale.factor: the VAE makes pictures 2 times smaller, and .* set upscale.factor=2", upscale__factor=4)
    refused("upscale.base: .*nothere: there is no such folder", upscale__base=str(tmp_path / "nothere"))
    refused("upscale.base: .* makes pictures of 16 pixels, .* is 24; set data.size=32", data__size=48)
    tiny.inpaint_pipeline(tmp_path / "encoder").save_pretrained(tmp_path / "inpaint")
    refused("upscale.base: .* takes a class, numbers or a second picture", upscale__base=str(tmp_path / "inpaint"))
    tiny.upscale_pipeline(tmp_path / "encoder").save_pretrained(tmp_path / "upscaler")
    refused("upscale.base: .* is an upscaler; name the model", upscale__base=str(tmp_path / "upscaler"))
    numbers = Numbers(("size",), (0.0,), (1.0,))
    tiny.numbers_pipeline(tmp_path / "encoder", numbers).save_pretrained(tmp_path / "numbers")
    refused("upscale.base: .* takes a class, numbers or a second", upscale__base=str(tmp_path / "numbers"))
    few, student = tiny.pipeline(tmp_path / "encoder"), tiny.student_pipeline(tmp_path / "encoder")
    few.scheduler.register_to_config(solver_order=1)
    for name, pipe in (("few", few), ("student", student)):
        pipe.save_pretrained(tmp_path / name)
        refused(f"upscale.base: .*{name} knows a few steps alone, .*; name", upscale__base=str(tmp_path / name))
    assert not (tmp_path / "run/checkpoints").exists()
