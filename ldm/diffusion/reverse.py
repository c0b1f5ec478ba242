"""The reverse process: from noise back to a sample, one denoising step at a time.

Given both ends, a point in the middle of the chain is Gaussian. For any s < t (the neighbor s = t - 1
is Ho et al. 2020, eq. 6-7; any s is Kingma et al. 2021, appendix A), with alpha_{t|s} = alpha_t / alpha_s:

    q(x_t | x_s)     = N(alpha_{t|s} x_s, beta_{t|s} I)          beta_{t|s} = sigma_t**2 - alpha_{t|s}**2 sigma_s**2
    q(x_s | x0)      = N(alpha_s x0, sigma_s**2 I)
    q(x_s | x_t, x0) = N(mean, beta_tilde I)                     by Bayes, where precisions add:

    1 / beta_tilde    = 1 / sigma_s**2 + alpha_{t|s}**2 / beta_{t|s}
    mean / beta_tilde = alpha_s x0 / sigma_s**2 + alpha_{t|s} x_t / beta_{t|s}

    =>  beta_tilde = beta_{t|s} sigma_s**2 / sigma_t**2
        mean       = alpha_s beta_{t|s} / sigma_t**2 x0 + alpha_{t|s} sigma_s**2 / sigma_t**2 x_t

With preserved variance beta_{t|s} = 1 - alpha_{t|s}**2.
A sampler doesn't know x0. It puts the network's pred_x0 into the mean and picks a variance: beta_{t|s},
right for x0 ~ N(0, I) then; beta_tilde, right for a single known x0; or, learned, a point between the two
(Nichol & Dhariwal 2021, eq. 15). s = -1 stands for the clean sample, with alpha = 1 and sigma = 0.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ldm.diffusion.parameterization import Prediction, score_from_eps, to_eps, to_flow, to_v, to_x0
from ldm.diffusion.schedule import NoiseSchedule

Variance = Literal["beta", "beta_tilde", "learned"]


@dataclass(frozen=True)
class Denoiser:
    """A network, the process it was trained on, and what its answer means.

    Attributes:
        network: (x_t [B, C, ...], t int64 [B]) => prediction [B, C, ...], or [B, 2C, ...] with learned variance.
        schedule: the schedule of its training.
        prediction: what it predicts.
        variance: of its reverse steps.
    """

    network: Callable[[Tensor, Tensor], Tensor]
    schedule: NoiseSchedule
    prediction: Prediction = "eps"
    variance: Variance = "beta_tilde"

    def split(self, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor | None]:
        """The network's answer as (prediction, variance fraction or None), each shaped like x_t.

        Raises:
            ValueError: if the answer hasn't the shape of x_t, or twice its channels with learned variance.
        """
        output = self.network(x_t, t)
        channels = x_t.shape[1] * (2 if self.variance == "learned" else 1)
        expected = (x_t.shape[0], channels, *x_t.shape[2:])
        if output.shape != expected:
            raise ValueError(f"network: expected {list(expected)} ({self.variance}), got {list(output.shape)}")
        if self.variance != "learned":
            return output, None
        prediction, fraction = output.chunk(2, dim=1)
        return prediction, fraction

    def x0(self, x_t: Tensor, t: Tensor) -> Tensor:
        """pred_x0, shaped like x_t: E[x0 | x_t] of a perfect network."""
        return to_x0(self.prediction, self.split(x_t, t)[0], x_t, *self.schedule.at(t, x_t))

    def eps(self, x_t: Tensor, t: Tensor) -> Tensor:
        """pred_eps, shaped like x_t."""
        return to_eps(self.prediction, self.split(x_t, t)[0], x_t, *self.schedule.at(t, x_t))

    def v(self, x_t: Tensor, t: Tensor) -> Tensor:
        """pred_v, shaped like x_t."""
        return to_v(self.prediction, self.split(x_t, t)[0], x_t, *self.schedule.at(t, x_t))

    def flow(self, x_t: Tensor, t: Tensor) -> Tensor:
        """pred_eps - pred_x0, shaped like x_t."""
        return to_flow(self.prediction, self.split(x_t, t)[0], x_t, *self.schedule.at(t, x_t))

    def score(self, x_t: Tensor, t: Tensor) -> Tensor:
        """grad log q(x_t), shaped like x_t."""
        return score_from_eps(self.eps(x_t, t), self.schedule.at(t, x_t)[1])


class Bridge(NamedTuple):
    """The numbers of q(x_s | x_t, x0), each float64 [B, 1, ..., 1] on the CPU."""

    x0_factor: Tensor
    x_t_factor: Tensor
    beta: Tensor
    beta_tilde: Tensor


def bridge(schedule: NoiseSchedule, t: Tensor, s: Tensor, ndim: int) -> Bridge:
    """The coefficients of the derivation above, for timesteps s < t.

    Raises:
        IndexError: unless -1 <= s < t < T.
    """
    t, s = t.cpu(), s.cpu()
    if not bool(((s >= -1) & (s < t) & (t < schedule.T)).all()):
        raise IndexError(f"timesteps: expected -1 <= s < t < {schedule.T}, got t = {t.tolist()}, s = {s.tolist()}")
    alpha_bar = torch.cat([torch.ones(1, dtype=torch.float64), schedule.alpha_bar]).reshape(-1, *[1] * (ndim - 1))
    sigma2 = torch.cat([torch.zeros(1, dtype=torch.float64), schedule.sigma2]).reshape(alpha_bar.shape)
    alpha_bar_t, alpha_bar_s, sigma2_t, sigma2_s = alpha_bar[t + 1], alpha_bar[s + 1], sigma2[t + 1], sigma2[s + 1]
    ratio = alpha_bar_t / alpha_bar_s  # alpha_{t|s}**2
    beta = sigma2_t - ratio * sigma2_s
    return Bridge(
        x0_factor=alpha_bar_s.sqrt() * beta / sigma2_t,  # Ho et al. 2020, eq. 7
        x_t_factor=ratio.sqrt() * sigma2_s / sigma2_t,
        beta=beta,
        beta_tilde=beta * sigma2_s / sigma2_t,
    )


def posterior(schedule: NoiseSchedule, x0: Tensor, x_t: Tensor, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """q(x_s | x_t, x0), exactly.

    Args:
        x0, x_t: [B, ...].
        t, s: int64 [B], -1 <= s < t < T; the textbook's step has s = t - 1.
    Returns:
        mean [B, ...]; variance [B, 1, ..., 1], which is 0 where s is -1.
    """
    c = bridge(schedule, t, s, x_t.ndim)
    return c.x0_factor.to(x_t) * x0 + c.x_t_factor.to(x_t) * x_t, c.beta_tilde.to(x_t)


def x0_from_mean(schedule: NoiseSchedule, mean: Tensor, x_t: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """The x0 whose posterior mean this is: prediction of the mean => pred_x0."""
    c = bridge(schedule, t, s, x_t.ndim)
    return (mean - c.x_t_factor.to(x_t) * x_t) / c.x0_factor.to(x_t)


def log_variance(
    schedule: NoiseSchedule, t: Tensor, s: Tensor, like: Tensor, variance: Variance, fraction: Tensor | None = None
) -> Tensor:
    """The log of the variance of p(x_s | x_t).

    Args:
        fraction: [B, C, ...] for "learned": -1 stands for beta_tilde, 1 for beta, on a log scale.
    Returns:
        [B, 1, ..., 1], or shaped like `fraction`. Where s is -1, beta_tilde is 0 and has no log; the first
        positive one, of t = 1, stands in for it there (as in the code of Nichol & Dhariwal 2021).
    """
    c = bridge(schedule, t, s, like.ndim)
    first = torch.ones(1, dtype=torch.int64)
    floor = bridge(schedule, first, first - 1, like.ndim).beta_tilde if schedule.T > 1 else c.beta
    upper = c.beta.log().to(like)
    lower = torch.where(c.beta_tilde > 0, c.beta_tilde, floor).log().to(like)
    if variance == "beta":
        return upper
    if variance == "beta_tilde":
        return lower
    if variance == "learned" and fraction is not None:
        weight = (fraction + 1) / 2
        return weight * upper + (1 - weight) * lower  # Nichol & Dhariwal 2021, eq. 15
    raise ValueError(f"variance: expected beta, beta_tilde, or learned with a fraction, got {variance!r}")


def reverse_distribution(denoiser: Denoiser, x_t: Tensor, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """p(x_s | x_t): the mean [B, ...] and the log variance, which broadcasts against it."""
    prediction, fraction = denoiser.split(x_t, t)
    pred_x0 = to_x0(denoiser.prediction, prediction, x_t, *denoiser.schedule.at(t, x_t))
    mean, _ = posterior(denoiser.schedule, pred_x0, x_t, t, s)
    return mean, log_variance(denoiser.schedule, t, s, x_t, denoiser.variance, fraction)


def ancestral_step(denoiser: Denoiser, x_t: Tensor, t: Tensor, s: Tensor, noise: Tensor) -> Tensor:
    """Draw x_s ~ p(x_s | x_t); the clean sample (s = -1) is the mean, without noise (Ho et al. 2020, alg. 2)."""
    mean, log_var = reverse_distribution(denoiser, x_t, t, s)
    clean = (s < 0).to(x_t.device).reshape(-1, *[1] * (x_t.ndim - 1))
    return torch.where(clean, mean, mean + (0.5 * log_var).exp() * noise)
