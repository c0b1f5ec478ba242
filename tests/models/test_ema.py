"""The average of the weights is that of diffusers, and of the formula."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch
from diffusers.training_utils import EMAModel

from ldm.models.ema import averaged, build_ema


@pytest.mark.parametrize("decay", [0.5, 0.9, 0.9999])
def test_a_step_is_that_of_diffusers_and_of_the_formula(decay: float) -> None:
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.LayerNorm(7))
    ours, theirs = build_ema(net, decay), EMAModel(net.parameters(), decay=decay)
    expected = [weight.detach().double() for weight in net.parameters()]
    for step in range(1, 40):
        for weight in net.parameters():
            weight.data += torch.randn_like(weight)
        ours.step(net.parameters())
        theirs.step(net.parameters())
        now = 0.0 if step == 1 else min(step / (9 + step), decay)  # the first step forgets where training began
        expected = [now * e + (1 - now) * w.detach() for e, w in zip(expected, net.parameters(), strict=True)]
        assert ours.cur_decay_value == theirs.cur_decay_value == pytest.approx(now)
    for mine, stock, exact in zip(ours.shadow_params, theirs.shadow_params, expected, strict=True):
        assert torch.allclose(mine, stock, rtol=1e-5, atol=1e-6)
        assert torch.allclose(mine.double(), exact, rtol=1e-5, atol=1e-6)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    assert ours.optimization_step == theirs.optimization_step == 39


def test_inside_the_network_is_the_average_and_afterwards_itself_without_a_copy() -> None:
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.LayerNorm(7))
    ema = build_ema(net, 0.9)
    for weight in net.parameters():
        weight.data += 1
    own, average = ([weight.clone() for weight in weights] for weights in (net.parameters(), ema.shadow_params))
    places = {weight.data_ptr() for weight in [*net.parameters(), *ema.shadow_params]}

    def same(weights: Iterable[torch.Tensor], expected: list[torch.Tensor]) -> bool:
        return all(torch.equal(mine, right) for mine, right in zip(weights, expected, strict=True))

    with averaged(net, ema):
        assert same(net.parameters(), average)
        assert {weight.data_ptr() for weight in net.parameters()} <= places
    assert same(net.parameters(), own)
    assert same(ema.shadow_params, average)
    with pytest.raises(RuntimeError, match="on purpose"), averaged(net, ema):
        raise RuntimeError("on purpose")
    assert same(net.parameters(), own)
    ema.step(net.parameters())  # and it goes on from where it was
    assert same(ema.shadow_params, own)  # the first step forgets where training began
