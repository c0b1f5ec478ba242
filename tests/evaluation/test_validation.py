"""Validation losses and caption gaps against independent computations."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ldm.diffusion.forward import q_sample
from ldm.diffusion.schedule import NoiseSchedule
from ldm.evaluation.validation import (
    CaptionedValidationSet,
    CaptionLosses,
    LabeledValidationSet,
    ValidationSet,
    by_quarter,
    caption_losses,
    classifier_accuracy,
    derangement,
    squared_errors,
)
from ldm.models.conditioning import Conditioning
from ldm.models.unet import UNetConfig, build_unet

T = 1000
SCHEDULE = NoiseSchedule.linear(T)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


# --- the validation loss -------------------------------------------------------------------------


def validation_set(pictures: int = 6) -> ValidationSet:
    rng = generator()
    x0 = torch.randn(pictures, 2, 4, 4, generator=rng)
    return ValidationSet.fixed(x0, Conditioning(torch.randn(pictures, 3, 5)), T, rng)


def test_timesteps_cover_every_quarter_and_are_fixed() -> None:
    first, again = validation_set(), validation_set()
    assert torch.equal(first.t, again.t) and torch.equal(first.eps, again.eps)
    for quarter, t in enumerate(first.t):
        assert (t // (T // 4) == quarter).all()


def test_an_oracle_has_no_loss_and_a_zero_network_has_the_power_of_the_noise() -> None:
    """For all three kinds of prediction, the true prediction gives 0; predicting eps = 0 gives mean eps**2."""
    data = validation_set()
    noise_of = {int(t): data.eps[i, j] for i, row in enumerate(data.t) for j, t in enumerate(row)}
    x0_of = {int(t): data.x0[j] for row in data.t for j, t in enumerate(row)}
    assert len(noise_of) == data.t.numel()  # all t differ, or the lookup below would be wrong

    def oracle(kind: str, x0: bool, eps: bool) -> object:
        def network(x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
            clean = torch.stack([x0_of[int(i)] for i in t]) * x0
            noise = torch.stack([noise_of[int(i)] for i in t]) * eps
            alpha = (1 - SCHEDULE.betas).cumprod(0)[t].sqrt().reshape(-1, 1, 1, 1).float()
            sigma = (1 - alpha**2).sqrt()
            return {"eps": noise, "x0": clean, "v": alpha * noise - sigma * clean}[kind]

        return network

    for kind in ("eps", "v", "x0"):
        losses = by_quarter(squared_errors(oracle(kind, True, True), SCHEDULE, kind, data, batch_size=4))  # type: ignore[arg-type]
        assert losses["total"] < 1e-6, kind
    losses = by_quarter(squared_errors(oracle("eps", True, False), SCHEDULE, "eps", data))  # type: ignore[arg-type]
    for i in range(4):
        assert abs(losses[f"q{i + 1}"] - float(data.eps[i].square().mean())) < 1e-5
    assert abs(losses["total"] - sum(losses[f"q{i}"] for i in (1, 2, 3, 4)) / 4) < 1e-6


# --- the shuffled captions -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "captions",
    [
        [("a",), ("b",)],
        [("a",), ("a",), ("b",), ("c",)],  # half of them share one
        [("a",)] * 20 + [("b",)] * 15 + [("c",)] * 5,
        [("a", "b"), ("b", "c"), ("d",), ("e", "a")],  # the shuffled caption must be none of several
        [(f"caption {i}",) for i in range(50)],
    ],
)
def test_no_picture_keeps_a_caption_of_its_own(captions: list[tuple[str, ...]]) -> None:
    order = derangement(captions, generator())
    assert order is not None
    assert sorted(order.tolist()) == list(range(len(captions)))  # every caption is used once
    assert not [i for i, giver in enumerate(order.tolist()) if captions[giver][0] in captions[i]]


@pytest.mark.parametrize("captions", [[("a",)], [("a",)] * 3 + [("b",)] * 2])
def test_a_majority_cannot_be_shuffled(captions: list[tuple[str, ...]]) -> None:
    assert derangement(captions, generator()) is None
    true = ValidationSet.fixed(
        torch.randn(len(captions), 2, 4, 4), Conditioning(torch.randn(len(captions), 3, 8)), T, generator()
    )
    data = CaptionedValidationSet.of(true, captions, torch.zeros(1, 3, 8), generator())
    found = caption_losses(lambda x_t, t, conditioning: x_t, SCHEDULE, "eps", data)
    assert found.losses()["shuffled"] is None and set(found.gap_estimates(10)) == {"null"}


# --- the caption gaps -------------------------------------------------------------------------------------


def captioned_set(pictures: int, context: Tensor, x0: Tensor) -> CaptionedValidationSet:
    true = ValidationSet.fixed(x0, Conditioning(context), T, generator())
    captions = [(f"caption {i}",) for i in range(pictures)]
    return CaptionedValidationSet.of(true, captions, torch.zeros(1, *context.shape[1:]), generator())


def unet_losses(without_cross_attention: bool) -> CaptionLosses:
    torch.manual_seed(0)
    config = UNetConfig(channels=(32, 64), attention=(True, True), layers=1, head_channels=16)
    unet = build_unet(config, latent_shape=(2, 8, 8), context_dim=8).eval()
    for name, weight in unet.named_parameters():
        if without_cross_attention and ".attn2.to_out" in name:
            torch.nn.init.zeros_(weight)
    data = captioned_set(6, torch.randn(6, 3, 8), torch.randn(6, 2, 8, 8))
    with torch.no_grad():
        return caption_losses(
            lambda x_t, t, c: unet(x_t, t, encoder_hidden_states=c.context).sample, SCHEDULE, "eps", data
        )


def test_without_cross_attention_the_gap_is_exactly_zero() -> None:
    gaps = unet_losses(without_cross_attention=True).gaps()
    assert set(gaps) == {"shuffled", "null"}
    for gap in gaps.values():
        assert torch.equal(gap, torch.zeros(4, 6))
    for gap in unet_losses(without_cross_attention=False).gaps().values():  # the same network with it
        assert (gap != 0).all()


def test_an_oracle_that_reads_x0_from_its_context_has_the_gap_of_the_closed_form() -> None:
    """It predicts the eps for which x0 is its context; a wrong x0' has the error snr |x0 - x0'|^2."""
    n = 10
    x0 = torch.randn(n, 2, 4, 4, generator=generator(), dtype=torch.float64)
    data = captioned_set(n, x0.reshape(n, 1, 32), x0)

    def oracle(x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        assert conditioning.context is not None
        alpha, sigma = SCHEDULE.at(t, x_t)
        return (x_t - alpha * conditioning.context.reshape(-1, 2, 4, 4)) / sigma

    found = caption_losses(oracle, SCHEDULE, "eps", data)
    assert found.shuffled is not None and data.shuffled is not None
    assert found.true.max() < 1e-6
    for errors, other in ((found.shuffled, data.shuffled.reshape(x0.shape)), (found.null, torch.zeros_like(x0))):
        expected = SCHEDULE.snr[data.true.t] * (x0 - other).square().flatten(1).mean(1)  # (4, n)
        torch.testing.assert_close(errors.double(), expected, rtol=1e-3, atol=1e-5)
    for gap in found.gap_estimates().values():
        assert gap["total"]["low"] > 0  # clearly positive
        assert gap["total"]["n"] == n
        quarters = [gap[f"q{i}"]["value"] for i in (1, 2, 3, 4)]
        assert gap["total"]["value"] == pytest.approx(sum(quarters) / 4)


# --- the accuracy of a classifier ----------------------------------------------------------------


def test_accuracy_by_quarter_is_the_share_of_correct_classes() -> None:
    """A classifier that is right below t = 500 and predicts class 0 from there on."""
    rng = generator()
    x0, labels = torch.randn(40, 1, 2, 2, generator=rng), torch.arange(40) % 4
    data = LabeledValidationSet.fixed(x0, labels, T, rng)
    label_of = {
        q_sample(SCHEDULE, x0[i : i + 1], t[i : i + 1], eps[i : i + 1]).sum().item(): int(labels[i])
        for t, eps in zip(data.t, data.eps, strict=True)
        for i in range(40)
    }

    def classifier(x_t: Tensor, t: Tensor) -> Tensor:
        known = [label_of[x.sum().item()] for x in x_t]
        predicted = torch.tensor([label if step < 500 else 0 for label, step in zip(known, t, strict=True)])
        return torch.eye(4)[predicted] * 100

    found = classifier_accuracy(classifier, SCHEDULE, data, batch_size=7)
    loss = found.pop("loss")
    assert found == {"total": 0.625, "q1": 1.0, "q2": 1.0, "q3": 0.25, "q4": 0.25}
    assert loss == pytest.approx(100 * 0.75 / 2)
