"""Guided consistency distillation: one evaluation for what takes a guided sampler dozens.

The probability-flow ODE carries x_t along one path to one x0. A consistency function gives that end for every point of
the path, and a point's own value where there is no noise left (Song et al. 2023, definition 1):

    f(x_t, t) = f(x_s, s)  for x_s on the path of x_t,      f(x, 0) = x

The second holds by construction, with c_skip(0) = 1 and c_out(0) = 0 (eq. 5); pred_x0 is the network's:

    f(x, t) = c_skip(t) x + c_out(t) pred_x0(x, t)

The first is learned. A solver of the teacher's ODE takes one step from x_t to x_s, and f at t learns what f at s is,
a constant for the gradient (Luo et al. 2023, alg. 1). The teacher is guided at a scale that is part of the input, so
the student knows the whole range of scales and needs no second evaluation for any of them:

    x_s = alpha_s pred_x0 + sigma_s pred_eps,   both guided                   (DDIM; Song et al. 2021, eq. 12)
    L   = d(f(x_t, t, scale), f_average(x_s, s, scale)),   d(a) = sqrt(a**2 + c**2) - c

The solver's timesteps k-1, 2k-1, ..., T-1 are those that stock LCMScheduler chooses its steps from, and its 0 is the
least noisy t, as there. Sampling with f adds noise anew after each step, from f's x0 (Song et al. 2023, alg. 1).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ldm.diffusion.forward import q_sample
from ldm.diffusion.losses import Network
from ldm.diffusion.parameterization import Prediction, to_eps, to_x0
from ldm.diffusion.schedule import NoiseSchedule, beside

SIGMA_DATA, TIMESTEP_SCALING = 0.5, 10.0  # as stock LCMScheduler has them


def solver_pairs(u: Tensor, T: int, steps: int) -> tuple[Tensor, Tensor, Tensor]:
    """Where one step of the solver begins and ends, and a number that is left for the scale.

    Args:
        u: float64 [B] in [0, 1). Its place among `steps` equal parts decides t; where it lies in that part is again
            uniform, and independent of t.
        steps: a divisor of T.
    Returns:
        t, s: int64 [B], s < t, and a float64 [B] in [0, 1).
    """
    scaled = u * steps
    number = scaled.long().clamp(max=steps - 1)
    stride = T // steps
    t = (number + 1) * stride - 1
    return t, (t - stride).clamp(min=0), (scaled - number).clamp(0, 1)


def boundary_scalings(t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """c_skip and c_out, [B, 1, ..., 1], for t [B] (Song et al. 2023, appendix C, with time in tenths of a timestep)."""
    scaled = t.cpu().double() * TIMESTEP_SCALING
    total = scaled**2 + SIGMA_DATA**2
    shape = (-1, *[1] * (like.ndim - 1))
    return tuple(beside(each, like).reshape(shape) for each in (SIGMA_DATA**2 / total, scaled / total.sqrt()))  # type: ignore[return-value]


def consistency(schedule: NoiseSchedule, prediction: Prediction, output: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """f(x_t, t) of a network's output there, shaped like x_t.

    Args:
        prediction: what the output is.
        t: int64 [B] in [0, T).
    """
    c_skip, c_out = boundary_scalings(t, x_t)
    return c_skip * x_t + c_out * to_x0(prediction, output, x_t, *schedule.at(t, x_t))  # eq. 5


def ddim_step(
    schedule: NoiseSchedule, prediction: Prediction, output: Tensor, x_t: Tensor, t: Tensor, s: Tensor
) -> Tensor:
    """x_s [B, ...] on the path of x_t [B, ...], from a network's output at x_t (Song et al. 2021, eq. 12, eta = 0).

    Args:
        t, s: int64 [B] in [0, T), s < t.
    """
    here, there = schedule.at(t, x_t), schedule.at(s, x_t)
    return there[0] * to_x0(prediction, output, x_t, *here) + there[1] * to_eps(prediction, output, x_t, *here)


def pseudo_huber(difference: Tensor, c: float) -> Tensor:
    """sqrt(a**2 + c**2) - c, the mean of each sample: [B, ...] => [B] (Song & Dhariwal 2024, section 3.3)."""
    return ((difference**2 + c**2).sqrt() - c).flatten(1).mean(1)


def consistency_loss(
    student: Network,
    target: Network,
    teacher: Network,
    schedule: NoiseSchedule,
    prediction: Prediction,
    x0: Tensor,
    eps: Tensor,
    t: Tensor,
    s: Tensor,
    *,
    huber_c: float,
) -> Tensor:
    """The distance of f at both ends of one step of the solver (Luo et al. 2023, eq. 17), for each sample.

    Args:
        student: the network that learns; target: its average; teacher: guided. All predict the same kind.
        x0, eps: [B, ...], as in `q_sample`.
        t, s: int64 [B], as `solver_pairs` has them.
        huber_c: of the pseudo-Huber distance.
    Returns:
        [B].
    """
    x_t = q_sample(schedule, x0, t, eps)  # (B, ...)
    with torch.no_grad():
        x_s = ddim_step(schedule, prediction, teacher(x_t, t), x_t, t, s)
        expected = consistency(schedule, prediction, target(x_s, s), x_s, s)
    found = consistency(schedule, prediction, student(x_t, t), x_t, t)
    return pseudo_huber(found - expected, huber_c)
