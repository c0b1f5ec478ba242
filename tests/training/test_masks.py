"""Training to inpaint: masks by (seed, n), the channels that stock feeds, and a run whose folder stock opens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import road
import tiny
import torch
from diffusers import StableDiffusionInpaintPipeline
from PIL import Image
from torch.nn.functional import interpolate

from ldm import LDMPipeline
from ldm.data.batches import load_pixels
from ldm.models.conditioning import Conditioning
from ldm.models.vae import to_pictures
from ldm.training.config import Config
from ldm.training.masks import BOXES, SIDE, WHOLE, Masking, draw_mask
from ldm.training.randomness import generator
from ldm.training.run import train
from ldm.training.samples import Batch

PLAIN = {"text__encoder": "minilm", "text__max_length": 32, "unet__channels": [128, 192, 256], "unet__layers": 2,
         "unet__attention": [False, True, True], "unet__head_channels": 64}  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures, a model to start from, and one that inpaints."""
    folder = tmp_path_factory.mktemp("inpaint")
    road.draw_folder(folder / "data")
    tiny.pipeline(folder / "encoder", "clip").save_pretrained(folder / "model")
    tiny.inpaint_pipeline(folder / "encoder").save_pretrained(folder / "inpainting")
    return folder


def config_of(home: Path, run: Path, init: str = "model", **words: Any) -> Config:
    given = {"run": str(run), "init": str(home / init), "data__inpaint": "true", "loop__steps": 4, **PLAIN, **words}
    return road.recipe(home, **given)


# --- masks ---------------------------------------------------------------------------------------------


def masks(count: int, size: int, seed: int = 0) -> torch.Tensor:
    return torch.cat([draw_mask(generator(seed, "mask", n), size) for n in range(count)])


def test_a_mask_is_a_function_of_seed_and_n() -> None:
    pixels = torch.rand(3, 32, 32) * 2 - 1
    there, back = (
        {n: Masking(7, 32, (4, 8, 8))(n, pixels) for n in order} for order in (range(20), reversed(range(20)))
    )
    for n in there:
        for name, tensor in there[n].items():
            assert torch.equal(tensor, back[n][name])
        assert torch.equal(there[n]["masked_pixels"], torch.where(there[n]["mask"], 0.0, pixels))
    assert len({there[n]["mask"].numpy().tobytes() for n in there}) > 15
    assert not torch.equal(masks(20, 32), masks(20, 32, seed=1))


@pytest.mark.parametrize("size", [16, 64, 256])
def test_masks_are_of_all_kinds_and_none_is_lost_in_the_latents(size: int) -> None:
    """Shares by the words of the module, within four standard errors; a side is one box at two corners."""
    drawn = masks(600, size)
    assert drawn.shape == (600, size, size) and drawn.dtype == torch.bool
    factor = 2 if size == 16 else 8
    assert bool(drawn[:, ::factor, ::factor].flatten(1).any(1).all())
    share = drawn.float().mean((1, 2))
    assert abs(float((share == 1).float().mean()) - WHOLE) < 4 * (WHOLE * (1 - WHOLE) / 600) ** 0.5
    corners = torch.stack([drawn[:, y, x] for y in (0, -1) for x in (0, -1)]).float().sum(0)
    rows, columns = drawn.any(2), drawn.any(1)
    boxes = (rows[:, :, None] & columns[:, None, :]) == drawn
    sides = boxes.flatten(1).all(1) & (corners == 2) & (rows.all(1) | columns.all(1))
    assert abs(float(sides.float().mean()) - SIDE) < 4 * (SIDE * (1 - SIDE) / 600) ** 0.5 + 0.02
    assert 0.2 < float(share.mean()) < 0.5 and float((share < 0.1).float().mean()) > 0.02 and BOXES < 0.5


def test_strokes_are_round_and_not_boxes() -> None:
    drawn = masks(200, 64)
    rows, columns = drawn.any(2), drawn.any(1)
    rectangles = ((rows[:, :, None] & columns[:, None, :]) == drawn).flatten(1).all(1)
    assert 40 < int((~rectangles).sum()) < 160


# --- what the U-Net is given ------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("cache", ["auto", "off"])
def test_channels_are_stock_s_of_the_mask_and_the_masked_picture(home: Path, tmp_path: Path, cache: str) -> None:
    """By stock's own preprocessing of picture and mask files, also of mirrored pictures; step 0 is the model's."""
    from test_initial_model import built

    task = built(config_of(home, tmp_path, data__cache=cache, data__flip="true"))
    task.prepare()
    stock = StableDiffusionInpaintPipeline.from_pretrained(home / "model", safety_checker=None)
    (batch,) = task.batches([range(6)])
    assert batch.conditioning.channels is not None and batch.conditioning.channels.shape == (6, 5, 8, 8)
    samples: Any = task.samples
    for n in range(6):
        drawn = samples.draw(n)
        row = samples.pictures[drawn.row]
        (picture,) = to_pictures(load_pixels(row, 16, flip=drawn.flip)[None])
        masking = Masking(0, 16, (4, 8, 8))(n, torch.zeros(3, 16, 16))
        mask = stock.mask_processor.preprocess(Image.fromarray(masking["mask"][0].numpy()).convert("L"))
        left = stock.image_processor.preprocess(picture) * (mask < 0.5)
        posterior = stock.vae.encode(left).latent_dist
        latents = (posterior.mean + posterior.std * masking["mask_noise"]) * stock.vae.config.scaling_factor
        expected = torch.cat([interpolate(mask, size=(8, 8)), latents], 1)
        torch.testing.assert_close(batch.conditioning.channels[n : n + 1], expected, rtol=1e-4, atol=1e-5)
    x_t, t = batch.x0.contiguous(), torch.tensor([3] * 6)
    found = task.output(task.initial_unet(), x_t, t, batch.conditioning)
    assert torch.equal(found, stock.unet(x_t, t, batch.conditioning.context).sample)


# --- a run -----------------------------------------------------------------------------------------------


def test_a_run_fills_in_and_stock_opens_its_folder(home: Path, tmp_path: Path) -> None:
    """Cached or not, with processes that read pictures or without, the losses are the same; the new channels learn."""
    words = {"loop__steps": 8, "loop__log_every": 1, "loop__checkpoint_every": 8, "loop__evaluate_every": 4,
             "loop__sample_every": 8, "optim__lr": 0.004, "optim__ema_decay": 0.5}  # fmt: skip
    losses = train("ldm", config_of(home, tmp_path / "run", **words, data__workers=2))
    quiet = {**words, "loop__steps": 3, "loop__sample_every": 0, "loop__evaluate_every": 0}
    again = train("ldm", config_of(home, tmp_path / "again", **quiet, data__cache="off"))
    assert np.allclose(losses[:3], again, rtol=1e-4)
    heldout = list(road.logged(tmp_path / "run", "ldm/heldout/total").values())
    assert np.isfinite(losses).all() and heldout[-1] < heldout[0]

    with Image.open(tmp_path / "run/samples/step_0000008.png") as grid:
        assert grid.height > grid.width / 3  # three rows: pictures, what masks leave, filled in
    ours = LDMPipeline.from_pretrained(tmp_path / "run/pipeline")
    stock = StableDiffusionInpaintPipeline.from_pretrained(tmp_path / "run/pipeline")
    assert bool(ours.unet.conv_in.weight[:, 4:].any())
    picture = Image.open(home / "data/images/red_heart.png")
    mask = Image.new("L", picture.size)
    mask.paste(255, (4, 4, 12, 12))
    found = [
        pipe("red heart", image=picture, mask_image=mask, num_inference_steps=3, height=16, width=16,
             generator=torch.Generator().manual_seed(1), output_type="latent").images
        for pipe in (ours, stock)
    ]  # fmt: skip
    assert torch.equal(*found)
    with pytest.raises(ValueError, match=r"data\.inpaint: init=.* fills in masked parts; set it to true"):
        train("ldm", config_of(home, tmp_path / "other", str(tmp_path / "run/pipeline"), data__inpaint="false"))


def test_a_second_picture_beside_the_masked_one_is_refused(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        config_of(home, tmp_path, data__condition_column="outline")
    assert "data.inpaint: the masked picture is the second one" in capsys.readouterr().err


def test_half_the_size_keeps_masks_black_and_white() -> None:
    """Latents become means of four; the mask is what stock makes of the picture's mask at that size."""
    mask, left = draw_mask(generator(0, "mask", 3), 16)[None], torch.randn(1, 4, 8, 8)
    x0, u = torch.randn(1, 4, 8, 8), torch.zeros(1)
    channels = torch.cat([interpolate(mask.float(), size=(8, 8)), left], 1)
    small = Batch(x0, Conditioning(channels=channels), u, x0).halved().conditioning.channels
    assert small is not None and small.shape == (1, 5, 4, 4)
    assert torch.equal(small[:, :1], interpolate(mask.float(), size=(4, 4)))
    torch.testing.assert_close(small[:, 1:], left.unflatten(2, (4, 2)).unflatten(4, (4, 2)).mean((3, 5)))
    plain = Batch(x0, Conditioning(channels=left), u, x0).halved().conditioning.channels
    assert plain is not None and torch.equal(plain, small[:, 1:])


def test_a_model_of_second_pictures_does_not_learn_to_inpaint(home: Path, tmp_path: Path) -> None:
    tiny.condition_pipeline(tmp_path / "encoder").save_pretrained(tmp_path / "pictures")
    with pytest.raises(ValueError, match=r"data\.condition_column: init=.* takes a second picture"):
        train("ldm", config_of(home, tmp_path / "run", str(tmp_path / "pictures")))
    with pytest.raises(ValueError, match=r"data\.inpaint: init=.* fills in masked parts"):
        train("ldm", config_of(home, tmp_path / "run", "inpainting", data__inpaint="false"))
