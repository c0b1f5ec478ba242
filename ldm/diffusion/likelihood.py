"""How likely a sample is under the model: the evidence lower bound, term by term.

The chain p(x_T) prod p(x_s | x_t) explains x0 through noisy versions of it. Whatever the network, by Jensen

    -log p(x0) <= L_T + sum_{t > 0} L_t + L_0                                 (Ho et al. 2020, eq. 5)

    L_T = KL(q(x_T | x0) || N(0, I))                    what the last timestep still tells of x0: `prior_kl`
    L_t = E KL(q(x_s | x_t, x0) || p(x_s | x_t))        the error of a denoising step: `vlb_term`
    L_0 = E -log p(x0 | x_t), t the last step           the decoder, which turns the least noisy x_t into data

All in nats, summed over the dimensions of a sample. A chain of fewer steps, timesteps t_1 > ... > t_n, is a
model too, with its own and usually looser bound; `elbo` takes any.

Of what kind is x0? Pixels of 8 bits are discrete: their decoder is the mass of a bin, L_0 >= 0, and the bound in
bits/dim is the length of a lossless code. Latents are continuous: their decoder is a density, and the bound in nats/dim
estimates a differential entropy. It may be negative, it moves by log(c) when latents are scaled by c, and it says
nothing of the pictures that the VAE can't tell apart. Compare it between models on the same latents only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ldm.diffusion.forward import q_sample
from ldm.diffusion.reverse import Denoiser, posterior, reverse_distribution
from ldm.diffusion.schedule import NoiseSchedule

Decoder = Literal["pixels", "latents"]


def normal_kl(mean: Tensor, log_var: Tensor, other_mean: Tensor, other_log_var: Tensor) -> Tensor:
    """KL(N(mean, e**log_var) || N(other_mean, e**other_log_var)), elementwise, in nats."""
    return 0.5 * (
        other_log_var - log_var - 1 + (log_var - other_log_var).exp() + (mean - other_mean) ** 2 / other_log_var.exp()
    )


def normal_log_prob(x: Tensor, mean: Tensor, log_var: Tensor) -> Tensor:
    """log N(x; mean, e**log_var), elementwise."""
    return -0.5 * (math.log(2 * math.pi) + log_var + (x - mean) ** 2 / log_var.exp())


def discretized_normal_log_prob(x: Tensor, mean: Tensor, log_var: Tensor, levels: int = 256) -> Tensor:
    """log of the mass that a normal puts into the bin of a pixel (Ho et al. 2020, eq. 13), elementwise.

    Args:
        x: one of `levels` values evenly spaced in [-1, 1]. The bins meet halfway; the outer two reach to infinity.
    """
    half = 1 / (levels - 1)  # of a bin's width
    std = (0.5 * log_var).exp()
    upper = torch.where(x > 1 - half, math.inf, (x + half - mean) / std)
    lower = torch.where(x < -1 + half, -math.inf, (x - half - mean) / std)
    # Far to the right both masses round to 1: mirror the bin to the left, where logs keep their digits.
    lower, upper = torch.where(lower > 0, -upper, lower), torch.where(lower > 0, -lower, upper)
    log_upper, log_lower = torch.special.log_ndtr(upper), torch.special.log_ndtr(lower)
    return log_upper + (-torch.expm1(log_lower - log_upper)).log()  # log(e**a - e**b) = a + log(1 - e**(b - a))


def prior_kl(schedule: NoiseSchedule, x0: Tensor) -> Tensor:
    """L_T = KL(q(x_T | x0) || N(0, I)), nats [B]. Exactly 0 with zero terminal SNR."""
    t = torch.full((len(x0),), schedule.T - 1)
    alpha, sigma = schedule.at(t, x0)
    zero = torch.zeros_like(x0)
    return normal_kl(alpha * x0, 2 * sigma.log(), zero, zero).flatten(1).sum(1)


def vlb_term(
    denoiser: Denoiser, x0: Tensor, x_t: Tensor, t: Tensor, s: Tensor, *, decoder: Decoder = "latents"
) -> Tensor:
    """L_t of each sample, for one draw of x_t ~ q(x_t | x0).

    Args:
        x0, x_t: [B, ...]; x0 in [-1, 1] in steps of 2/255 for the decoder "pixels".
        t, s: int64 [B], -1 <= s < t; where s is -1 the term is the decoder's.
    Returns:
        nats [B].
    """
    mean, log_var = reverse_distribution(denoiser, x_t, t, s)
    true_mean, true_var = posterior(denoiser.schedule, x0, x_t, t, s)
    last = (s < 0).to(x0.device).reshape(true_var.shape)  # (B, 1, ..., 1)
    # Where s is -1 the posterior is a point and its KL infinite: compute that of any width, and don't use it.
    kl = normal_kl(true_mean, torch.where(last, 1.0, true_var).log(), mean, log_var)
    log_prob = discretized_normal_log_prob if decoder == "pixels" else normal_log_prob
    return torch.where(last, -log_prob(x0, mean, log_var), kl).flatten(1).sum(1)


class Elbo(NamedTuple):
    """The negative bound of each sample, in its parts; nats.

    prior: [B] L_T.
    timesteps: the n timesteps, descending.
    terms: [B, n] L_t for each of them; the last one is the decoder's.
    """

    prior: Tensor
    timesteps: list[int]
    terms: Tensor

    @property
    def total(self) -> Tensor:
        """[B]: at least -log p(x0)."""
        return self.prior + self.terms.sum(1)


@torch.no_grad()
def elbo(
    denoiser: Denoiser,
    x0: Tensor,
    *,
    generator: torch.Generator,
    timesteps: Sequence[int] | None = None,
    decoder: Decoder = "latents",
) -> Elbo:
    """The bound of each sample, each term by one draw of x_t.

    Args:
        x0: [B, ...].
        generator: of the noise, on the device of x0.
        timesteps: descending from T - 1; all by default, one call of the network for each.
    """
    timesteps = list(timesteps) if timesteps is not None else denoiser.schedule.timesteps()
    if timesteps[0] != denoiser.schedule.T - 1:
        raise ValueError(f"timesteps: the chain starts at {denoiser.schedule.T - 1}, got {timesteps[0]}")
    terms = []
    for step, next_step in zip(timesteps, [*timesteps[1:], -1], strict=True):
        t = torch.full((len(x0),), step, device=x0.device)
        eps = torch.randn(x0.shape, generator=generator, dtype=x0.dtype, device=x0.device)
        x_t = q_sample(denoiser.schedule, x0, t, eps)
        terms.append(vlb_term(denoiser, x0, x_t, t, torch.full_like(t, next_step), decoder=decoder))
    return Elbo(prior_kl(denoiser.schedule, x0), timesteps, torch.stack(terms, dim=1))


def nats_per_dim(nats: Tensor, x0: Tensor) -> Tensor:
    """Nats of a sample => nats per dimension."""
    return nats / x0[0].numel()


def bits_per_dim(nats: Tensor, x0: Tensor) -> Tensor:
    """Nats of a sample => bits per dimension; 8 for a uniform guess at 8-bit pixels."""
    return nats_per_dim(nats, x0) / math.log(2)
