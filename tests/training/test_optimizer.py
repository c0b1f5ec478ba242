"""The learning rate against its definition and torch's schedules; updates, skipped or not, against torch's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accelerate import Accelerator

from ldm.training.config import OptimConfig
from ldm.training.optimizer import fused_step, learning_rate, update, with_nan_gradients

NAN, INF = float("nan"), float("inf")


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


# --- updates ------------------------------------------------------------------------------------------


def network() -> tuple[torch.nn.Linear, torch.optim.AdamW]:
    torch.manual_seed(0)
    net = torch.nn.Linear(3, 2)
    return net, torch.optim.AdamW(net.parameters(), lr=0.1, weight_decay=0.5, fused=True)


def take(net: Any, optimizer: Any, value: float, clip: float = 1.0) -> float:
    """A step whose gradients hold this value in one place (0: an ordinary step)."""
    net(torch.ones(1, 3)).square().sum().backward()
    net.weight.grad[0, 0] += value
    return float(update(Accelerator(cpu=True), net, optimizer, 0.1, clip))


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_a_skipped_step_is_as_if_it_had_never_been(value: float) -> None:
    """The same weights and moments, to the last bit, as those of a run that had only the other steps."""
    (one, one_optimizer), (other, other_optimizer) = network(), network()
    assert [take(one, one_optimizer, v) for v in (0, value, 0, value, value, 0)] == [0, 1, 0, 1, 1, 0]
    assert [take(other, other_optimizer, 0) for _ in range(3)] == [0, 0, 0]
    for mine, theirs in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, theirs)
        for key, moment in one_optimizer.state[mine].items():
            assert torch.equal(moment, other_optimizer.state[theirs][key])


@pytest.mark.parametrize("fused", [True, False])
def test_an_ordinary_step_is_torchs_own(fused: bool) -> None:
    (one, _), (other, _) = network(), network()
    ours, theirs = (torch.optim.AdamW(net.parameters(), lr=0.1, fused=fused) for net in (one, other))
    for _ in range(3):
        assert take(one, ours, 0, clip=0.1) == 0
        other(torch.ones(1, 3)).square().sum().backward()
        assert torch.nn.utils.clip_grad_norm_(other.parameters(), 0.1) > 0.1  # so there is something to clip
        theirs.step()
        theirs.zero_grad()
    for mine, other_weight in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.allclose(mine, other_weight, rtol=1e-6, atol=1e-7)
        for key, moment in ours.state[mine].items():
            assert torch.allclose(moment, theirs.state[other_weight][key], rtol=1e-5, atol=0), key
    before = one.weight.clone()
    assert take(one, ours, NAN) == 1
    assert torch.equal(one.weight, before)
    assert all(parameter.grad is None for parameter in one.parameters())


def test_a_loss_that_is_not_finite_has_nan_gradients() -> None:
    for value in (NAN, INF, -INF):
        x = torch.ones(2, requires_grad=True)
        with_nan_gradients(x.sum() + value).backward()
        assert x.grad is not None and x.grad.isnan().all()
    x = torch.tensor([0.1, 0.7], requires_grad=True)
    loss = x.square().sum()
    assert torch.equal(with_nan_gradients(loss), loss)
    (told,) = torch.autograd.grad(with_nan_gradients(loss), x, retain_graph=True)
    assert torch.equal(told, torch.autograd.grad(loss, x)[0])


def test_the_fused_kernel_reads_grad_scale_and_found_inf() -> None:
    """torch has no public argument for this; it fails where a new torch no longer reads the two attributes."""
    weights, gradient = torch.tensor([1.0, -2.0, 3.0]), torch.tensor([0.5, 4.0, -1.0])
    ours, theirs = (torch.nn.Parameter(weights.clone()) for _ in range(2))
    fused, plain = (torch.optim.AdamW([w], lr=0.1, fused=f) for w, f in ((ours, True), (theirs, False)))
    ours.grad, theirs.grad = gradient.clone(), gradient / 4
    fused_step(fused, torch.tensor(0.0), torch.tensor(4.0))
    plain.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
    torch.testing.assert_close(fused.state[ours]["exp_avg"], plain.state[theirs]["exp_avg"], rtol=1e-6, atol=0)
    before = {"weight": ours.detach().clone(), **{key: value.clone() for key, value in fused.state[ours].items()}}
    assert before["step"] == 1
    ours.grad = torch.full_like(ours, NAN)
    fused_step(fused, torch.tensor(1.0), torch.tensor(4.0))
    after = {"weight": ours.detach(), **fused.state[ours]}
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert not {"found_inf", "grad_scale"} & vars(fused).keys()  # the next step is an ordinary one
