"""What drawing and opening a cache cost, counted: the same numbers on every machine, so they may fail a build.

And what the benchmarks that time them rest on: equal noise, errors, slopes.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline

from benchmarks.pipelines import Arm, noise
from benchmarks.sample_quality import errors, worse
from benchmarks.scaling import slope
from benchmarks.synthetic import CHANNELS, Rows
from ldm.data.cache.latents import LatentCache
from ldm.pipelines.text_to_image import LDMPipeline

COUNTS, CONTEXT = (2_000, 12_000), (3, 4)
PROMPTS = ["red heart", "blue cat", "green pizza"]


def rows_of(part: Any, draw: Callable[[], Any]) -> list[int]:
    """The batch sizes that a network was asked while something is drawn."""
    asked: list[int] = []
    hook = part.register_forward_pre_hook(
        lambda _, args, words: asked.append(len(next(iter([*args, *words.values()])))), with_kwargs=True
    )
    draw()
    hook.remove()
    return asked


# --- network evaluations a picture ---------------------------------------------------------------------------------


def test_a_picture_takes_no_more_evaluations_than_its_defaults_say(tiny_pipeline_folder: Path) -> None:
    """20 guided steps: two rows of the U-Net each; the text encoder once a prompt and once for "", the decoder once."""
    pipeline = LDMPipeline.from_pretrained(tiny_pipeline_folder)
    assert pipeline.defaults.num_inference_steps <= 20
    counted = rows_of(pipeline.unet, lambda: pipeline(PROMPTS, seed=0))
    assert 20 * len(PROMPTS) <= sum(counted) <= 40 * len(PROMPTS)
    assert len(counted) == 20
    assert sum(
        rows_of(pipeline.unet, lambda: pipeline(PROMPTS, num_inference_steps=20, guidance_scale=1.0, seed=0))
    ) == 20 * len(PROMPTS)
    assert sum(rows_of(pipeline.text_encoder, lambda: pipeline(PROMPTS, seed=0))) <= 2 * len(PROMPTS)
    assert sum(rows_of(pipeline.vae.decoder, lambda: pipeline(PROMPTS, seed=0))) == len(PROMPTS)


def test_ours_asks_no_more_than_stock_and_draws_the_same_from_the_same_noise(tiny_pipeline_folder: Path) -> None:
    """What the benchmark compares is one and the same work, where both are told the same."""
    told = {"num_inference_steps": 4, "guidance_scale": 3.0}
    ours = Arm("ours", LDMPipeline.from_pretrained(tiny_pipeline_folder), told)
    stock = Arm("stock", StableDiffusionPipeline.from_pretrained(tiny_pipeline_folder), told)
    assert torch.equal(ours.pixels(PROMPTS, first_seed=5), stock.pixels(PROMPTS, first_seed=5))
    assert ours.rows == stock.rows == 8 * len(PROMPTS)
    alone = torch.cat([noise(ours.pipeline, [seed]) for seed in (5, 6, 7)])
    assert torch.equal(noise(ours.pipeline, range(5, 8)), alone)


# --- the cache -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory) -> list[Rows]:
    """A small and a larger cache of synthetic rows."""
    folder = tmp_path_factory.mktemp("synthetic")
    made = [Rows(folder, count, 2, CONTEXT) for count in COUNTS]
    for rows in made:
        rows.write()
    return made


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="Linux tells what a process reads")
def test_opening_a_cache_reads_the_same_whatever_it_holds(caches: list[Rows]) -> None:
    spent, opened = [], []
    for rows in caches:
        before = bytes_read()
        opened.append(rows.cache())
        spent.append(bytes_read() - before)
    assert 100 < spent[0] < 40_000  # a few pages of each database
    assert abs(spent[1] - spent[0]) < 100
    for rows, cache in zip(caches, opened, strict=True):
        check_all_rows(rows, cache)


def bytes_read() -> int:
    """By this process, through read()."""
    return int(Path("/proc/self/io").read_text().split()[1])


def check_all_rows(rows: Rows, cache: LatentCache) -> None:
    """Every row of a synthetic data set has a caption of its own, latents and a context."""
    pictures = rows.source().pictures
    assert len(pictures) == rows.count == len({row.captions for row in pictures})
    for number in (0, rows.count // 2, rows.count - 1):
        mean, std = cache.posterior(number, False)
        assert mean.shape == (CHANNELS, 2, 2) and (std > 0).all()
        assert cache.context(pictures[number].captions[0]).shape == CONTEXT
    assert cache.context("").shape == CONTEXT


# --- what the benchmarks reckon with -------------------------------------------------------------------------------


def test_slopes_are_exponents() -> None:
    x = [1.0, 4.0, 16.0, 64.0]
    assert slope(x, [3 * value**0.5 for value in x]) == pytest.approx(0.5)
    assert slope(x, [7.0] * 4) == pytest.approx(0.0)


def test_errors_are_gray_levels() -> None:
    black, white = -torch.ones(2, 3, 4, 4), torch.ones(2, 3, 4, 4)
    assert errors(black, white).tolist() == pytest.approx([255.0, 255.0])
    half = black.clone()
    half[:, :, :2] = 1.0  # half of the pixels are as wrong as can be
    assert errors(half, black).tolist() == pytest.approx([255 / 2**0.5] * 2)


def test_ours_is_worse_only_beyond_the_interval() -> None:
    ours = {"features": {"own": {"kid": {"low": 0.3, "high": 0.5}}}}
    row = {
        "ours_minus_it": {"error": {"low": -0.1, "high": 0.4}, "top-1, own": {"low": -0.2, "high": 0.1}},
        "features": {"own": {"kid": {"low": 0.1, "high": 0.35}}},
    }
    assert worse(ours, row) == []
    row["ours_minus_it"] = {"error": {"low": 0.1, "high": 0.4}, "top-1, own": {"low": -0.2, "high": -0.1}}
    row["features"]["own"]["kid"] = {"low": 0.1, "high": 0.2}
    assert worse(ours, row) == ["error", "top-1, own", "KID, own"]
