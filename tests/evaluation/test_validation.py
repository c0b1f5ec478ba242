"""The held-out loss against independent computations."""

from __future__ import annotations

import torch

from ldm.diffusion.schedule import NoiseSchedule
from ldm.evaluation.heldout import HeldOut, by_quarter, squared_errors
from ldm.models.conditioning import Conditioning

T = 1000


def questions(pictures: int = 6) -> HeldOut:
    rng = torch.Generator().manual_seed(0)
    return HeldOut.fixed(
        torch.randn(pictures, 2, 4, 4, generator=rng), Conditioning(torch.randn(pictures, 3, 5)), T, rng
    )


def test_questions_cover_every_quarter_and_stay_the_same() -> None:
    first, again = questions(), questions()
    assert torch.equal(first.t, again.t) and torch.equal(first.eps, again.eps)
    for quarter, t in enumerate(first.t):
        assert (t // (T // 4) == quarter).all()


def test_an_oracle_that_knows_the_noise_has_no_loss_and_a_silent_network_has_the_noise() -> None:
    """In all three kinds of prediction, the true answer gives 0 and the answer "no noise" gives mean eps**2."""
    schedule, asked = NoiseSchedule.linear(T), questions()
    noise_of = {int(t): asked.eps[i, j] for i, row in enumerate(asked.t) for j, t in enumerate(row)}
    x0_of = {int(t): asked.x0[j] for row in asked.t for j, t in enumerate(row)}
    assert len(noise_of) == asked.t.numel()  # no t twice, or the lookup below would lie

    def answer(kind: str, x0: bool, eps: bool) -> object:
        def network(x_t: torch.Tensor, t: torch.Tensor, told: Conditioning) -> torch.Tensor:
            clean = torch.stack([x0_of[int(i)] for i in t]) * x0
            noise = torch.stack([noise_of[int(i)] for i in t]) * eps
            alpha = (1 - schedule.betas).cumprod(0)[t].sqrt().reshape(-1, 1, 1, 1).float()
            sigma = (1 - alpha**2).sqrt()
            return {"eps": noise, "x0": clean, "v": alpha * noise - sigma * clean}[kind]

        return network

    for kind in ("eps", "v", "x0"):
        losses = by_quarter(squared_errors(answer(kind, True, True), schedule, kind, asked, batch_size=4))  # type: ignore[arg-type]
        assert losses["total"] < 1e-6, kind
    losses = by_quarter(squared_errors(answer("eps", True, False), schedule, "eps", asked))  # type: ignore[arg-type]
    for i in range(4):
        assert abs(losses[f"q{i + 1}"] - float(asked.eps[i].square().mean())) < 1e-5
    assert abs(losses["total"] - sum(losses[f"q{i}"] for i in (1, 2, 3, 4)) / 4) < 1e-6
