"""Chance is a function of (seed, n): nothing depends on what was drawn before or by whom."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ldm.data.batches import choose_caption
from ldm.training.randomness import Draw, draw, generator, row_of, sample_numbers

SHAPE = (2, 4, 4)


def sample(seed: int, n: int) -> Draw:
    return draw(seed, n, row=row_of(seed, n, 10), latent_shape=SHAPE, caption_dropout=0.25)


def test_a_sample_depends_on_seed_and_number_alone() -> None:
    first = sample(3, 17)
    torch.manual_seed(99)
    for n in (5, 0, 1000):
        sample(3, n)
    again = sample(3, 17)
    assert torch.equal(first.eps, again.eps)
    assert torch.equal(first.posterior_noise, again.posterior_noise)
    assert (first.row, first.caption, first.crop, first.flip, first.u) == (
        again.row, again.caption, again.crop, again.flip, again.u,
    )  # fmt: skip


def test_other_seeds_and_other_samples_have_other_noise() -> None:
    noises = [sample(seed, n).eps for seed in (0, 1) for n in (0, 1, 2)]
    noises += [sample(0, 0).posterior_noise]
    for i, a in enumerate(noises):
        assert not any(torch.equal(a, b) for b in noises[:i])


def test_every_epoch_visits_every_picture_once_in_another_order() -> None:
    epochs = [[sample(0, 10 * epoch + i).row for i in range(10)] for epoch in range(5)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 5


def test_distributions() -> None:
    """u uniform, noise standard normal, captions dropped at their rate, within five standard errors."""
    draws = [sample(1, n) for n in range(4000)]
    u = torch.tensor([d.u for d in draws])
    assert u.min() >= 0 and u.max() < 1
    assert abs(u.mean() - 0.5) < 5 / 12**0.5 / 4000**0.5
    assert abs(u.var() - 1 / 12) < 5 / 180**0.5 / 4000**0.5
    dropped = sum(d.caption is None for d in draws) / 4000
    assert abs(dropped - 0.25) < 5 * (0.25 * 0.75 / 4000) ** 0.5
    flips = sum(d.flip for d in draws) / 4000
    assert abs(flips - 0.5) < 5 * 0.5 / 4000**0.5
    eps = torch.stack([d.eps for d in draws]).flatten()
    assert abs(eps.mean()) < 5 / len(eps) ** 0.5
    assert abs(eps.var() - 1) < 5 * (2 / len(eps)) ** 0.5
    both = torch.stack([d.posterior_noise for d in draws]).flatten()
    assert abs((eps * both).mean()) < 5 / len(eps) ** 0.5


def test_captions_are_dropped_anew_each_epoch() -> None:
    by_row: dict[int, set[bool]] = {}
    for n in range(200):
        drawn = sample(0, n)
        by_row.setdefault(drawn.row, set()).add(drawn.caption is None)
    assert all(seen == {True, False} for seen in by_row.values())


def test_captions_of_a_picture_are_chosen_evenly() -> None:
    chosen = Counter(choose_caption(("a", "b", "c"), sample(0, n).caption) for n in range(4000))
    assert abs(chosen[""] / 4000 - 0.25) < 0.035
    assert all(abs(chosen[caption] / 4000 - 0.25) < 0.035 for caption in "abc")


def test_generator_uses_all_of_its_key() -> None:
    seen = {
        int(torch.randint(2**62, (), generator=generator(*key))) for key in [(0,), (1,), (0, 1), (0, "1"), (0, 1, 0)]
    }
    assert len(seen) == 5


@given(
    steps=st.integers(1, 5), processes=st.integers(1, 4), accumulation=st.integers(1, 3), share=st.integers(1, 4),
    first=st.integers(0, 4),
)  # fmt: skip
def test_processes_share_the_very_samples_of_one(
    steps: int, processes: int, accumulation: int, share: int, first: int
) -> None:
    size = processes * accumulation * share
    first = min(first, steps)
    alone = sample_numbers(first, steps, size, 1, 0, 1)
    assert alone == [range(step * size, (step + 1) * size) for step in range(first, steps)]
    ranks = [sample_numbers(first, steps, size, accumulation, rank, processes) for rank in range(processes)]
    for step in range(steps - first):
        parts = [n for rank in ranks for part in rank[step * accumulation : (step + 1) * accumulation] for n in part]
        assert sorted(parts) == list(alone[step])


def test_a_batch_that_cannot_be_shared_is_refused() -> None:
    with pytest.raises(ValueError, match=r"loop.batch_size: 10 .* multiple of 4"):
        sample_numbers(0, 1, 10, 2, 0, 2)
