"""The objective: noise a sample, predict, compare.

    x_t  = alpha_t x0 + sigma_t eps                         (Ho et al. 2020, eq. 4)
    L    = E_{x0, eps, t}  w_t || target - network(x_t, t) ||**2

With the noise as target and w_t = 1 this is L_simple (eq. 14), the default everywhere here. Least squares
is minimized by the conditional mean E[target | x_t] whatever w_t > 0, so the weight decides only which
timesteps a network of limited capacity serves first.

One weight for every prediction. x_t is given, so an error d of x0 is an error (alpha/sigma) d of eps and
d/sigma of v. Squared, with snr = alpha**2 / sigma**2 and 1/sigma**2 = snr + 1:

    |error of eps|**2 = snr |error of x0|**2          |error of v|**2 = (snr + 1) |error of x0|**2
    |error of flow|**2 = (sqrt(snr) + 1)**2 |error of x0|**2

A weighting below is the weight of the squared error of x0 as a function of the SNR; `loss_weight`
divides by these factors. Least squares may be any of the following; all have the same minimizer.

    w on x0      on eps
    snr          1                     L_simple
    min(snr, 5)  min(snr, 5) / snr     min-SNR
    max(snr, 1)  max(snr, 1) / snr     truncated SNR
    snr/(k+snr)  1 / (k + snr)         P2, gamma = 1

The absolute error (L1) has another minimizer, the conditional median.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from ldm.diffusion.forward import q_sample
from ldm.diffusion.likelihood import Decoder, vlb_term
from ldm.diffusion.parameterization import Prediction, target
from ldm.diffusion.reverse import Denoiser
from ldm.diffusion.schedule import NoiseSchedule, beside, gather

Network = Callable[[Tensor, Tensor], Tensor]
#: snr, float64 [B] => the weight of the squared error of x0, float64 [B].
Weighting = Callable[[Tensor], Tensor]


def min_snr(gamma: float = 5.0) -> Weighting:
    """min(snr, gamma): no timestep of little noise outweighs the rest (Hang et al. 2023, section 3.4)."""
    return lambda snr: snr.clamp(max=gamma)


def truncated_snr() -> Weighting:
    """max(snr, 1): the noisy end keeps its weight on x0 (Salimans & Ho 2022, section 4)."""
    return lambda snr: snr.clamp(min=1.0)


def p2(gamma: float = 1.0, k: float = 1.0) -> Weighting:
    """1 / (k + snr)**gamma on the error of eps: coarse content before clean-up (Choi et al. 2022, section 3)."""
    return lambda snr: snr / (k + snr) ** gamma


def loss_weight(
    schedule: NoiseSchedule,
    t: Tensor,
    prediction: Prediction,
    weighting: Weighting | None = None,
) -> Tensor:
    """w_t, the weight of the squared error of this kind of prediction.

    Args:
        t: int64 [B] in [0, T).
        weighting: None is weight 1 on the prediction's own error.
    Returns:
        float64 [B], on the CPU.
    """
    snr = gather(schedule.snr, t, torch.empty(0, dtype=torch.float64))  # (B,)
    if weighting is None:
        return torch.ones_like(snr)
    snr = snr.clamp(min=torch.finfo(torch.float64).tiny)  # 0 at zero terminal SNR: take the limit of w / snr
    factor = {"eps": snr, "v": snr + 1, "x0": torch.ones_like(snr), "flow": (snr.sqrt() + 1) ** 2}[prediction]
    return weighting(snr) / factor


def diffusion_loss(
    network: Network,
    schedule: NoiseSchedule,
    x0: Tensor,
    t: Tensor,
    eps: Tensor,
    *,
    prediction: Prediction = "eps",
    weighting: Weighting | None = None,
    norm: Literal["l2", "l1"] = "l2",
) -> Tensor:
    """The weighted error of each sample; its mean over the batch is the training loss.

    Args:
        network: (x_t [B, ...], t [B]) => prediction, shaped like x_t.
        x0, t, eps: as in `q_sample`.
        weighting: as in `loss_weight`.
        norm: squared error, or absolute error.
    Returns:
        [B], float32 or the wider dtype of x0.
    """
    x_t = q_sample(schedule, x0, t, eps)  # (B, ...)
    answer = target(prediction, x0, eps, *schedule.at(t, x0))
    weight = loss_weight(schedule, t, prediction, weighting)  # (B,)
    output = network(x_t, t)
    if output.shape != x0.shape:
        raise ValueError(f"network: expected the shape of x0, {list(x0.shape)}, got {list(output.shape)}")
    wide = torch.promote_types(x0.dtype, torch.float32)
    error = output.to(wide) - answer.to(wide)
    distance = error.abs() if norm == "l1" else error.square()
    return beside(weight, distance) * distance.flatten(1).mean(1)


def score_matching_loss(score: Network, schedule: NoiseSchedule, x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
    """Denoising score matching, sigma_t**2 || s(x_t, t) - grad log q(x_t | x0) ||**2 (Song et al. 2021, eq. 7).

    grad log q(x_t | x0) = -(x_t - alpha x0) / sigma**2 = -eps / sigma, so with s = -pred_eps / sigma this is
    || eps - pred_eps ||**2: L_simple under another name (Vincent 2011).

    Args:
        score: (x_t [B, ...], t [B]) => grad log q(x_t), shaped like x_t.
        x0, t, eps: as in `q_sample`.
    Returns:
        [B], the mean over each sample's elements.
    """
    alpha, sigma = schedule.at(t, x0)
    x_t = q_sample(schedule, x0, t, eps)
    grad_log_q = -(x_t - alpha * x0) / sigma**2
    return (sigma * (score(x_t, t) - grad_log_q)).square().flatten(1).mean(1)


def vlb_loss(denoiser: Denoiser, x0: Tensor, t: Tensor, eps: Tensor, *, decoder: Decoder = "latents") -> Tensor:
    """T L_t of each sample: averaged over t it is L_vlb without its constant L_T (Nichol & Dhariwal 2021, eq. 4).

    Returns:
        [B], nats per dimension.
    """
    x_t = q_sample(denoiser.schedule, x0, t, eps)
    return denoiser.schedule.T * vlb_term(denoiser, x0, x_t, t, t - 1, decoder=decoder) / x0[0].numel()


def hybrid_loss(
    denoiser: Denoiser,
    x0: Tensor,
    t: Tensor,
    eps: Tensor,
    *,
    vlb_weight: float = 1e-3,
    weighting: Weighting | None = None,
    decoder: Decoder = "latents",
) -> Tensor:
    """L_simple for the mean plus a little L_vlb for the learned variance (Nichol & Dhariwal 2021, eq. 16).

    L_vlb sees the mean detached: it teaches the variance channels only. One call of the network serves both.

    Args:
        denoiser: its network answers [B, 2C, ...], its variance is "learned".
        x0, t, eps: as in `q_sample`.
    Returns:
        [B].
    """
    x_t = q_sample(denoiser.schedule, x0, t, eps)
    prediction, fraction = denoiser.split(x_t, t)
    if fraction is None:
        raise ValueError(f"hybrid_loss: expected a denoiser of learned variance, got {denoiser.variance!r}")
    detached = torch.cat([prediction.detach(), fraction], dim=1)
    simple = diffusion_loss(
        lambda *_: prediction, denoiser.schedule, x0, t, eps,
        prediction=denoiser.prediction, weighting=weighting,
    )  # fmt: skip
    vlb = vlb_loss(replace(denoiser, network=lambda *_: detached), x0, t, eps, decoder=decoder)
    return simple + vlb_weight * vlb  # eq. 16
