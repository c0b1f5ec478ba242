"""Training on pictures of several sizes: order, batches, cache, a run and its pipeline."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import road
import tiny
import torch
from diffusers import StableDiffusionPipeline
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from ldm import LDMPipeline
from ldm.data import facts
from ldm.data.batches import load_pixels
from ldm.data.buckets import Buckets
from ldm.data.dataset import read_captioned
from ldm.models.vae import encode
from ldm.training.config import Config
from ldm.training.order import Order
from ldm.training.previews import Prompt, halved
from ldm.training.randomness import row_of, sample_numbers
from ldm.training.run import train
from ldm.training.sizes import buckets_of

SIZE, SIZES = 32, ((32, 32), (24, 48), (80, 36), (20, 30))  # of training; of the pictures: nearest are 4 buckets


# --- the order -----------------------------------------------------------------------------------------


def buckets(counts: list[int]) -> Buckets:
    sizes = tuple((8 * (i + 1), 8 * (len(counts) - i)) for i in range(len(counts)))
    of = np.repeat(np.arange(len(counts)), counts)
    return Buckets(sizes, np.random.default_rng(0).permutation(of).astype(np.int64))


@given(
    counts=st.lists(st.integers(1, 40), min_size=1, max_size=5), batch=st.integers(1, 16), seed=st.integers(0, 3),
    epochs=st.integers(1, 5),
)  # fmt: skip
def test_batches_have_one_size_and_every_picture_is_seen_equally_often(
    counts: list[int], batch: int, seed: int, epochs: int
) -> None:
    order = Order(seed, buckets(counts), batch)
    steps = sum(epochs * count // batch for count in counts)
    seen = Counter[int]()
    for step in range(steps):
        rows = [order(n) for n in range(step * batch, (step + 1) * batch)]
        assert len({order.buckets.of[row] for row in rows}) == 1
        seen.update(rows)
    for i, (_, group) in enumerate(order.buckets.groups()):
        times = [seen[number] for number in group.tolist()]
        assert max(times) - min(times) <= 1 and max(times) <= epochs
        assert sum(times) == epochs * counts[i] // batch * batch  # less than a batch of it is left for later


def test_a_sample_depends_on_seed_and_number_alone() -> None:
    there = Order(3, buckets([30, 5, 17]), 4)
    rows = [there(n) for n in range(400)]
    back = Order(3, buckets([30, 5, 17]), 4)
    assert [back(n) for n in reversed(range(400))] == rows[::-1]
    assert [Order(4, buckets([30, 5, 17]), 4)(n) for n in range(400)] != rows
    epochs = [rows[i : i + 52] for i in range(0, 400, 52)]
    assert len({tuple(epoch) for epoch in epochs}) == len(epochs)


def test_without_buckets_the_order_is_what_it_was() -> None:
    for batch in (1, 3, 8):
        order = Order(7, Buckets.square(64, 10), batch)
        assert [order(n) for n in range(95)] == [row_of(7, n, 10) for n in range(95)]


@given(counts=st.lists(st.integers(1, 12), min_size=1, max_size=4), batch=st.integers(1, 8), epochs=st.integers(1, 4))
def test_a_picture_with_repeats_is_seen_so_many_times_an_epoch(counts: list[int], batch: int, epochs: int) -> None:
    repeats = np.random.default_rng(1).integers(1, 5, sum(counts))
    order = Order(0, buckets(counts), batch, repeats)
    groups = [group for _, group in order.buckets.groups()]
    shown = [int(repeats[group].sum()) for group in groups]
    steps = sum(epochs * each // batch for each in shown)
    seen = Counter(order(n) for n in range(steps * batch))
    for group, each in zip(groups, shown, strict=True):
        short = [epochs * repeats[i] - seen[i] for i in group.tolist()]
        assert min(short) >= 0 and sum(short) == epochs * each % batch  # less than a batch of it is left for later


def test_buckets_take_turns() -> None:
    """A bucket's share of the steps is its share of the pictures, and its batches don't follow each other."""
    order = Order(0, buckets([320, 160]), 4)
    taken = [int(order.buckets.of[order(4 * step)]) for step in range(120)]
    assert Counter(taken) == {0: 80, 1: 40}
    assert 30 < sum(a != b for a, b in zip(taken, taken[1:], strict=False)) < 75


# --- a run ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wide and tall pictures with second ones of other sizes, and a model to start from."""
    folder = tmp_path_factory.mktemp("buckets")
    (folder / "data").mkdir()
    rows = []
    for i in range(24):
        picture = Image.new("RGB", SIZES[i % 4], "white")
        ImageDraw.Draw(picture).ellipse((2, 2, 16, 16), fill=list(road.COLORS.values())[i // 4 % 4])
        picture.save(folder / f"data/{i}.png")
        picture.convert("L").resize((2 * picture.width, 2 * picture.height)).save(folder / f"data/{i}-gray.png")
        row = {"file_name": f"{i}.png", "text": f"{list(road.COLORS)[i // 4 % 4]} cat", "gray": f"{i}-gray.png"}
        rows.append({**row, "split": "test" if i >= 18 else "train"})
    (folder / "data/metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tiny.pipeline(folder / "encoder", "clip").save_pretrained(folder / "model")
    return folder


def config_of(home: Path, run: Path, **words: Any) -> Config:
    given = {"run": str(run), "init": str(home / "model"), "data__size": SIZE, "data__buckets": "true",
             "loop__batch_size": 4, "loop__log_every": 1, **road.OF_INIT, **words}  # fmt: skip
    return road.recipe(home, **given)


def built(config: Config) -> Any:
    from test_initial_model import built

    task = built(config)
    task.prepare()
    return task


@torch.no_grad()
@pytest.mark.parametrize("cache", ["auto", "off"])
def test_a_batch_is_one_bucket_of_whole_pictures_and_their_second_ones(home: Path, tmp_path: Path, cache: str) -> None:
    """For one process and for two, cached or not; latents are those of the pictures at the bucket's size."""
    config = config_of(home, tmp_path, data__cache=cache, data__condition_column="gray", data__flip="true")
    task = built(config)
    vae, shapes = task.encoders.load_vae(), set()
    for numbers in sample_numbers(0, 6, 4, 1, 0, 1):
        (batch,) = task.batches([numbers])
        size = task.samples.order.buckets.size(task.samples.row_of(numbers[0]))
        shapes.add(tuple(batch.x0.shape[2:]))
        assert tuple(batch.x0.shape[2:]) == tuple(batch.eps.shape[2:]) == (size[1] // 2, size[0] // 2)
        step = numbers[0] // 4
        parts = [part for rank in (0, 1) for part in [sample_numbers(0, 6, 4, 1, rank, 2)[step]]]
        halves = task.batches(parts)
        torch.testing.assert_close(torch.cat([half.x0 for half in halves]), batch.x0, rtol=1e-4, atol=1e-5)
        assert torch.equal(torch.cat([half.eps for half in halves]), batch.eps)
        drawn = task.samples.draw(numbers[0])
        row, second = task.source.train.pictures[drawn.row], task.source.train.condition(drawn.row)
        posterior = encode(vae, load_pixels(row, size, flip=drawn.flip)[None])
        torch.testing.assert_close(batch.x0[:1], posterior.sample(drawn.posterior_noise), rtol=1e-4, atol=1e-4)
        channels = encode(vae, load_pixels(second, size, flip=drawn.flip)[None]).mean
        torch.testing.assert_close(batch.conditioning.channels[:1], channels, rtol=1e-4, atol=1e-4)
    assert len(shapes) > 2
    stores = list((tmp_path / "cache").glob("posteriors-*.sqlite")) if cache == "auto" else []
    assert len(stores) == (4 if cache == "auto" else 0)
    assert [tuple(one.true.x0.shape[2:]) for one in task.heldout] == [(24, 12), (20, 12), (16, 16), (12, 24)]


def test_no_picture_is_decoded_to_choose_its_bucket(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded = []
    monkeypatch.setattr(facts, "SETTLED", -1e9)
    read = facts.decode
    monkeypatch.setattr(facts, "decode", lambda data: decoded.append(1) or read(data))
    config = config_of(home, tmp_path)
    for expected in (24, 24):
        pictures = read_captioned(home / "data", progress=False, facts=tmp_path)
        found = buckets_of(config, pictures)
        assert len(decoded) == expected
        assert [found.size(i) for i in range(4)] == [(32, 32), (24, 48), (48, 24), (24, 40)]


def test_a_run_resumes_exactly_and_stock_generates_the_same_wide_pictures(home: Path, tmp_path: Path) -> None:
    words: dict[str, Any] = {"loop__steps": 4, "loop__checkpoint_every": 2, "loop__evaluate_every": 4,
                             "loop__half_size_steps": 2, "loop__sample_every": 2}  # fmt: skip
    whole = train("ldm", config_of(home, tmp_path / "run", **words))
    assert np.isfinite(whole).all() and len(whole) == 4
    heldout = road.logged(tmp_path / "run", "ldm/heldout/total")
    last = tmp_path / "run/checkpoints/ldm/step_0000004"
    last.rename(tmp_path / "last")
    assert train("ldm", config_of(home, tmp_path / "run", **words)) == whole[2:]
    first, second = (folder / "unet.safetensors" for folder in (tmp_path / "last", last))
    assert first.read_bytes() == second.read_bytes()
    assert road.logged(tmp_path / "run", "ldm/heldout/total") == heldout and len(heldout) == 1
    assert all((tmp_path / f"run/samples/step_000000{step}.png").exists() for step in (2, 4))

    ours = LDMPipeline.from_pretrained(tmp_path / "run/pipeline")
    stock = StableDiffusionPipeline.from_pretrained(tmp_path / "run/pipeline", safety_checker=None)
    for width, height in ((96, 48), (48, 96)):
        given = {"width": width, "height": height, "num_inference_steps": 3, "guidance_scale": 3.0,
                 "output_type": "np"}  # fmt: skip
        found, expected = (
            pipe("red cat", **given, generator=torch.Generator().manual_seed(1)).images for pipe in (ours, stock)
        )
        assert found.shape == (1, height, width, 3) and np.array_equal(found, expected)


def test_a_preview_is_halved_where_a_pipeline_makes_the_half(home: Path, tmp_path: Path) -> None:
    """Sides of pipelines are multiples of 8; a smaller mask could be thinner than a latent, so its picture stays."""
    config = config_of(home, tmp_path)
    row = read_captioned(home / "data", progress=False)[0]
    whole = [
        Prompt("square"),
        *(Prompt("a", size=size) for size in ((48, 96), (24, 48))),
        Prompt("masked", picture=row),
    ]
    size = config.data.size
    assert [prompt.size for prompt in halved(whole, config)] == [(size // 2, size // 2), (24, 48), (24, 48), None]
    assert [prompt.caption for prompt in halved(whole, config)] == [prompt.caption for prompt in whole]


def test_masks_have_the_sizes_of_the_buckets(home: Path, tmp_path: Path) -> None:
    task = built(config_of(home, tmp_path, data__inpaint="true"))
    for numbers in sample_numbers(0, 5, 4, 1, 0, 1):
        (batch,) = task.batches([numbers])
        assert batch.conditioning.channels.shape == (4, 1 + batch.x0.shape[1], *batch.x0.shape[2:])
        assert bool((batch.conditioning.channels[:, 0] == 1).any())


def test_squares_alone_are_refused_before_anything_runs(home: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.buckets: with sides of multiples of 8 none but the square .* raise"):
        train("ldm", config_of(home, tmp_path, data__size=8))
    assert not any(tmp_path.iterdir())


def test_a_ratio_below_one_is_refused(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        config_of(home, tmp_path, data__bucket_ratio=0.5)
    assert "data.bucket_ratio" in capsys.readouterr().err
