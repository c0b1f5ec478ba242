"""Samplers: ancestral sampling, Langevin dynamics, and the ordinary differential equation with the same marginals.

The steps are what `ldm.inference.samplers` takes; the loops around them (`ancestral_sample`, `predictor_corrector`,
`ode_sample`) are there to be read and tested: a pipeline's loop is `ldm.inference.sampling.sample`.

**The ODE.** Let alpha = cos(phi) and sigma = sin(phi), phi from 0 (clean) to at most pi/2 (noise). Move every sample
along the mean velocity of the paths x_phi = cos(phi) x0 + sin(phi) eps that pass through it,

    dx/dphi = E[d x_phi / dphi | x_phi = x] = E[cos(phi) eps - sin(phi) x0 | x] = v(x, phi)                 (VP)

and by the continuity equation the density at each phi is q(x_phi): the probability-flow ODE of Song et al. 2021,
eq. 13, dx/dt = -beta/2 (x + score), in the coordinate in which its field is the v-prediction, finite everywhere. Seen
through y = x / alpha, s = sigma / alpha (the variance-exploding view, y = x0 + s eps) the same curves obey

    dy/ds = E[eps | y] = eps(y, s) = -s grad log q_s(y)                                                    (VE)

which is the form of Song et al. 2020 (DDIM, eq. 14) and Karras et al. 2022 (eq. 1). On the straight path of rectified
flow, alpha = 1 - s and sigma = s, they obey (Liu et al. 2023, eq. 1)

    dx/ds = E[eps - x0 | x] = u(x, s)                                                                      (flow)

The density carried along changes by the divergence of the field (eq. 39 of Song et al. 2021):

    log p(x_0) = log p(x_T) + integral from 0 to T of div field

Where there is no noise no field depends on the network: E[eps | x] = 0, so v = eps = 0 and u = -x. So the ODE reaches
clean data without a network that was ever trained there.

**Langevin dynamics** at fixed t, x <- x + step score + sqrt(2 step) noise, leaves q(x_t) as it is up to O(step).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from ldm.diffusion.likelihood import normal_log_prob
from ldm.diffusion.reverse import Denoiser, ancestral_step
from ldm.diffusion.schedule import NoiseSchedule, RectifiedFlow

Form = Literal["vp", "ve", "flow"]


# --- ancestral sampling ------------------------------------------------------------------------


def ancestral_sample(denoiser: Denoiser, x: Tensor, timesteps: Sequence[int], generator: torch.Generator) -> Tensor:
    """Draw clean samples by DDPM's ancestral sampling.

    Args:
        x: [B, ...] at the noise level of timesteps[0]; standard normal for the last timestep.
        timesteps: descending, as `NoiseSchedule.timesteps` gives them.
        generator: on the device of x.
    """
    for step, next_step in zip(timesteps, [*timesteps[1:], -1], strict=True):
        noise = torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)
        t = torch.full((len(x),), step, device=x.device)
        x = ancestral_step(denoiser, x, t, torch.full_like(t, next_step), noise)
    return x


# --- Langevin ----------------------------------------------------------------------------------


def langevin_step(denoiser: Denoiser, x_t: Tensor, t: Tensor, noise: Tensor, snr: float = 0.16) -> Tensor:
    """One step of Langevin dynamics in q(x_t), the corrector of Song et al. 2021 (alg. 4).

    The paper's step is 2 (snr |noise| / |score|)**2 with norms averaged over the batch, which ties the samples of a
    batch to each other. Here both norms have their expected values, sqrt(d) and sqrt(d) / sigma_t. (Alg. 5, for
    variance-preserving processes, has a further factor 1 - beta_t, nearly 1.)

    Args:
        x_t, noise: [B, ...].
        t: int64 [B].
        snr: how long the move along the score is beside that along the noise.
    """
    _, sigma = denoiser.schedule.at(t, x_t)
    step = 2 * (snr * sigma) ** 2
    return x_t + step * denoiser.score(x_t, t) + (2 * step).sqrt() * noise


def predictor_corrector(
    denoiser: Denoiser,
    x: Tensor,
    timesteps: Sequence[int],
    generator: torch.Generator,
    *,
    corrector_steps: int = 1,
    snr: float = 0.16,
) -> Tensor:
    """Draw clean samples: an ancestral step to the next timestep, then Langevin steps there (Song et al. 2021, alg. 1).

    Args:
        x: [B, ...] at the noise level of timesteps[0].
        timesteps: descending, as `NoiseSchedule.timesteps` gives them.
        generator: on the device of x.
    """

    def noise() -> Tensor:
        return torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)

    for step, next_step in zip(timesteps, [*timesteps[1:], -1], strict=True):
        t = torch.full((len(x),), step, device=x.device)
        s = torch.full_like(t, next_step)
        x = ancestral_step(denoiser, x, t, s, noise())
        for _ in range(corrector_steps if next_step >= 0 else 0):  # nothing to correct in clean samples
            x = langevin_step(denoiser, x, s, noise(), snr)
    return x


# --- the ODE -----------------------------------------------------------------------------------

#: (output, x) => the divergence of x -> output, [B]: each row of the output depends on its own row of x only.
Divergence = Callable[[Tensor, Tensor], Tensor]


def exact_divergence(output: Tensor, x: Tensor) -> Tensor:
    """The trace of d output / dx, by one backward pass for each of the d dimensions; [B]."""
    columns = output.flatten(1)  # (B, d)
    total = torch.zeros_like(columns[:, 0])
    for i in range(columns.shape[1]):
        (row,) = torch.autograd.grad(columns[:, i].sum(), x, retain_graph=True)
        total = total + row.flatten(1)[:, i]
    return total


def hutchinson_divergence(probe: Tensor) -> Divergence:
    """An unbiased estimate of the trace by one backward pass: E[z' J z] = tr J where E[z z'] = I (Hutchinson 1990).

    Args:
        probe: z, shaped like x: random signs (the least variance) or standard normal; one for a whole integration.
    """

    def divergence(output: Tensor, x: Tensor) -> Tensor:
        (product,) = torch.autograd.grad((output * probe).sum(), x)  # J' z
        return (product * probe).flatten(1).sum(1)

    return divergence


def angle(schedule: NoiseSchedule, level: int) -> float:
    """phi of a timestep, alpha = cos(phi) and sigma = sin(phi), in [0, pi/2]; 0 for -1, clean data."""
    return math.atan2(float(schedule.sigma[level]), float(schedule.alpha[level])) if level >= 0 else 0.0


def heun_step(start: Tensor, slope: Tensor, slope_there: Tensor, width: float) -> Tensor:
    """A step of so much width with the mean of the slopes at both of its ends, error O(width**3)."""
    return start + width / 2 * (slope + slope_there)


def _slope(
    denoiser: Denoiser, form: Form, state: Tensor, step: int, divergence: Divergence | None
) -> tuple[Tensor, Tensor | float]:
    """The field at a timestep, and its divergence (0 without one to compute it)."""
    if step < 0 and form == "flow":
        return -state, -float(state[0].numel())  # no noise: E[eps | x] = 0 and x0 = x
    if step < 0:
        return torch.zeros_like(state), 0.0
    t = torch.full((len(state),), step, device=state.device)
    with torch.set_grad_enabled(divergence is not None):
        state = state.detach().requires_grad_(divergence is not None)
        alpha, _ = denoiser.schedule.at(t, state)
        if form == "ve":
            field = denoiser.eps(alpha * state, t)  # y => x = alpha y
        else:
            field = denoiser.v(state, t) if form == "vp" else denoiser.flow(state, t)
        return field.detach(), divergence(field, state) if divergence else 0.0


def probability_flow(
    denoiser: Denoiser,
    x: Tensor,
    levels: Sequence[int],
    *,
    form: Form = "vp",
    divergence: Divergence | None = None,
) -> tuple[Tensor, Tensor]:
    """Carry samples along the ODE by Heun's method, error O(step**2).

    Args:
        x: [B, ...] x_t at levels[0].
        levels: timesteps in either direction; -1 is clean data.
        form: integrate dx/dphi = v; dy/ds = eps, which can't reach zero SNR, where s is infinite; or, for rectified
            flow, dx/ds = eps - x0.
        divergence: `exact_divergence` or a `hutchinson_divergence`, if the density is wanted.
    Returns:
        x_t at levels[-1]; [B] log q(x_t at levels[0]) - log q(x_t at levels[-1]), 0 without divergence.
    """
    alpha = torch.cat([torch.ones(1, dtype=torch.float64), denoiser.schedule.alpha])[torch.tensor(levels) + 1].tolist()
    sigma = torch.cat([torch.zeros(1, dtype=torch.float64), denoiser.schedule.sigma])[torch.tensor(levels) + 1].tolist()
    if form == "ve" and min(alpha) == 0:
        raise ValueError("form 've': sigma / alpha is infinite at zero terminal SNR; use 'vp'")
    if (form == "flow") != isinstance(denoiser.schedule, RectifiedFlow):
        raise ValueError("form: rectified flow has the form 'flow', and no other schedule has it")
    if form == "vp":
        place = [angle(denoiser.schedule, level) for level in levels]  # phi
        scale = [1.0] * len(levels)
    elif form == "flow":
        place, scale = sigma, [1.0] * len(levels)
    else:
        place = [b / a for a, b in zip(alpha, sigma, strict=True)]  # s
        scale = alpha
    state = x / scale[0]
    change = torch.zeros(len(x), dtype=x.dtype, device=x.device)
    for i in range(len(levels) - 1):
        h = place[i + 1] - place[i]
        k1, div1 = _slope(denoiser, form, state, levels[i], divergence)
        k2, div2 = _slope(denoiser, form, state + h * k1, levels[i + 1], divergence)
        state = heun_step(state, k1, k2, h)
        change = change + h / 2 * (div1 + div2)  # d log p / dh = -div
    if divergence is not None:
        change = change + x[0].numel() * math.log(scale[-1] / scale[0])  # p(x) = p(y) / alpha**d
    return scale[-1] * state, change


def ode_sample(denoiser: Denoiser, x: Tensor, timesteps: Sequence[int], *, form: Form = "vp") -> Tensor:
    """Draw clean samples: the ODE down to the last of the timesteps, then the denoiser's answer there.

    Args:
        x: [B, ...] at the noise level of timesteps[0].
        timesteps: descending, as `NoiseSchedule.timesteps` gives them.
    """
    x, _ = probability_flow(denoiser, x, timesteps, form=form)
    with torch.no_grad():
        return denoiser.x0(x, torch.full((len(x),), timesteps[-1], device=x.device))


def ode_log_likelihood(
    denoiser: Denoiser,
    x0: Tensor,
    divergence: Divergence = exact_divergence,
    *,
    timesteps: Sequence[int] | None = None,
    form: Form = "vp",
    log_prior: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """log p(x0) under the ODE: the density of the noise it comes from, and the change on the way.

    It is exact up to the step size, for a density that is smooth at the scale of sigma_0.

    Args:
        x0: [B, ...] clean samples.
        timesteps: descending from T - 1; all by default.
        log_prior: log density of x_t at the last timestep, [B, ...] => [B]; standard normal by default.
    Returns:
        nats [B].
    """
    timesteps = timesteps if timesteps is not None else denoiser.schedule.timesteps()
    x_t, change = probability_flow(denoiser, x0, [-1, *reversed(timesteps)], form=form, divergence=divergence)
    zero = torch.zeros_like(x_t)
    prior = log_prior(x_t) if log_prior else normal_log_prob(x_t, zero, zero).flatten(1).sum(1)
    return prior + change
