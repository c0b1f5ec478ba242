"""The text-use meter on models of which it is known what they read."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ldm.diffusion.schedule import NoiseSchedule
from ldm.evaluation.heldout import HeldOut
from ldm.evaluation.text_use import TextQuestions, TextUse, derangement, measure_text_use
from ldm.models.conditioning import Conditioning
from ldm.models.unet import UNetConfig, build_unet

T = 1000
SCHEDULE = NoiseSchedule.linear(T)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


# --- the shuffled captions -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "captions",
    [
        [("a",), ("b",)],
        [("a",), ("a",), ("b",), ("c",)],  # half of them share one
        [("a",)] * 20 + [("b",)] * 15 + [("c",)] * 5,
        [("a", "b"), ("b", "c"), ("d",), ("e", "a")],  # the caption handed on must be none of several
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
    true = HeldOut.fixed(
        torch.randn(len(captions), 2, 4, 4), Conditioning(torch.randn(len(captions), 3, 8)), T, generator()
    )
    asked = TextQuestions.of(true, captions, torch.zeros(1, 3, 8), generator())
    use = measure_text_use(lambda x_t, t, told: x_t, SCHEDULE, "eps", asked)
    assert use.losses()["shuffled"] is None and set(use.figures(10)) == {"null"}


# --- the gap -------------------------------------------------------------------------------------


def questions(pictures: int, context: Tensor, x0: Tensor) -> TextQuestions:
    true = HeldOut.fixed(x0, Conditioning(context), T, generator())
    captions = [(f"caption {i}",) for i in range(pictures)]
    return TextQuestions.of(true, captions, torch.zeros(1, *context.shape[1:]), generator())


def unet_use(without_cross_attention: bool) -> TextUse:
    torch.manual_seed(0)
    config = UNetConfig(channels=(32, 64), attention=(True, True), layers=1, head_channels=16)
    unet = build_unet(config, latent_shape=(2, 8, 8), context_dim=8).eval()
    for name, weight in unet.named_parameters():
        if without_cross_attention and ".attn2.to_out" in name:
            torch.nn.init.zeros_(weight)
    asked = questions(6, torch.randn(6, 3, 8), torch.randn(6, 2, 8, 8))
    with torch.no_grad():
        return measure_text_use(
            lambda x_t, t, told: unet(x_t, t, encoder_hidden_states=told.context).sample, SCHEDULE, "eps", asked
        )


def test_without_cross_attention_the_gap_is_exactly_zero() -> None:
    gaps = unet_use(without_cross_attention=True).gaps()
    assert set(gaps) == {"shuffled", "null"}
    for gap in gaps.values():
        assert torch.equal(gap, torch.zeros(4, 6))
    for gap in unet_use(without_cross_attention=False).gaps().values():  # the same network with it
        assert (gap != 0).all()


def test_an_oracle_that_reads_x0_from_its_context_has_the_gap_of_the_closed_form() -> None:
    """It answers with the eps that would make its context's x0 the truth; a wrong x0' errs by snr |x0 - x0'|^2."""
    n = 10
    x0 = torch.randn(n, 2, 4, 4, generator=generator(), dtype=torch.float64)
    asked = questions(n, x0.reshape(n, 1, 32), x0)

    def oracle(x_t: Tensor, t: Tensor, told: Conditioning) -> Tensor:
        assert told.context is not None
        alpha, sigma = SCHEDULE.at(t, x_t)
        return (x_t - alpha * told.context.reshape(-1, 2, 4, 4)) / sigma

    use = measure_text_use(oracle, SCHEDULE, "eps", asked)
    assert use.shuffled is not None and asked.shuffled is not None
    assert use.true.max() < 1e-6
    for errors, other in ((use.shuffled, asked.shuffled.reshape(x0.shape)), (use.null, torch.zeros_like(x0))):
        expected = SCHEDULE.snr[asked.true.t] * (x0 - other).square().flatten(1).mean(1)  # (4, n)
        torch.testing.assert_close(errors.double(), expected, rtol=1e-3, atol=1e-5)
    for figure in use.figures().values():
        assert figure["total"]["low"] > 0  # clearly positive
        assert figure["total"]["n"] == n
        quarters = [figure[f"q{i}"]["value"] for i in (1, 2, 3, 4)]
        assert figure["total"]["value"] == pytest.approx(sum(quarters) / 4)
