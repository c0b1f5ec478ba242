"""The learning rate against its definition at the points that matter, and torch's own schedules in between."""

from __future__ import annotations

import pytest
import torch

from ldm.training.config import OptimConfig
from ldm.training.learning_rate import learning_rate


def test_warm_up_is_linear_and_then_stays() -> None:
    rates = [learning_rate(0.5, step, 100, 4, "constant") for step in range(100)]
    assert rates[:5] == [0.125, 0.25, 0.375, 0.5, 0.5]
    assert set(rates[4:]) == {0.5}


def test_cosine_is_torchs() -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=50)
    for step in range(50):
        assert learning_rate(0.3, step, 50, 0, "cosine") == pytest.approx(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()


def test_both_are_multiplied() -> None:
    for step in range(10):
        whole = learning_rate(1.0, step, 10, 5, "cosine")
        assert whole == pytest.approx(min(1, (step + 1) / 5) * learning_rate(1.0, step, 10, 0, "cosine"))


def test_a_cooldown_falls_over_the_last_steps_alone() -> None:
    rates = [learning_rate(0.5, step, 100, 4, "constant", 16) for step in range(101)]
    assert rates[:84] == [learning_rate(0.5, step, 1000, 4, "constant") for step in range(84)]
    assert rates[84] == 0.5
    assert rates[88] == pytest.approx(0.25)  # a quarter of 16 steps: 1 - 1/2
    assert rates[93] == pytest.approx(0.125)  # nine sixteenths: 1 - 3/4
    assert rates[100] == learning_rate(0.5, 103, 100, 4, "constant", 16) == 0
    assert learning_rate(0.5, 103, 100, 4, "constant") == 0.5  # a trial may take more steps than the run
    assert rates[84:] == sorted(rates[84:], reverse=True)


def test_a_cosine_has_no_cooldown() -> None:
    with pytest.raises(ValueError, match=r"optim\.cooldown"):
        OptimConfig(decay="cosine", cooldown=10)
