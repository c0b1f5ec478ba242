"""What the network predicts, and how each prediction turns into the others.

x_t = alpha x0 + sigma eps is one equation in two unknowns. A network that answers one more
combination of x0 and eps has therefore answered them all (all shaped like x_t; alpha and sigma
broadcast against it, as `NoiseSchedule.at` gives them):

    eps     the noise                               Ho et al. 2020
    x0      the clean sample
    v       alpha eps - sigma x0                    Salimans & Ho 2022, appendix D
    flow    eps - x0, the velocity of a straight path from x0 to eps    Liu et al. 2023
    score   grad log q(x_t) = -eps / sigma          Song et al. 2021, and Tweedie's formula below

With alpha = cos(phi) and sigma = sin(phi), (x_t, v) is (x0, eps) turned by the angle phi, so the way
back turns by -phi. A rotation divides by nothing: v alone is well defined at both ends, where there
is no noise (sigma = 0, eps unknowable) and where there is nothing else (alpha = 0, x0 unknowable from eps).

Why the score: q(x_t) = integral of N(x_t; alpha x0, sigma**2) q(x0) dx0, so
grad log q(x_t) = E[(alpha x0 - x_t) / sigma**2 | x_t] = -E[eps | x_t] / sigma, and E[eps | x_t] is
what least squares makes of a noise predictor.

The mean of p(x_{t-1} | x_t), the fifth form, needs two timesteps: see `reverse.posterior` and `reverse.x0_from_mean`.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Prediction = Literal["eps", "x0", "v", "flow"]

#: Our names => diffusers' `prediction_type`.
DIFFUSERS_NAMES: dict[Prediction, str] = {
    "eps": "epsilon",
    "x0": "sample",
    "v": "v_prediction",
    "flow": "flow_prediction",
}


def v_from(x0: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """The velocity of a pair (x0, eps)."""
    return alpha * eps - sigma * x0


def eps_from_x0(x_t: Tensor, x0: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    return (x_t - alpha * x0) / sigma


def x0_from_eps(x_t: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    return (x_t - sigma * eps) / alpha  # not finite at alpha = 0


def eps_from_v(x_t: Tensor, v: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    return sigma * x_t + alpha * v


def x0_from_v(x_t: Tensor, v: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    return alpha * x_t - sigma * v


def v_from_x0(x_t: Tensor, x0: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    return (alpha * x_t - x0) / sigma


def v_from_eps(x_t: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    return (eps - sigma * x_t) / alpha  # not finite at alpha = 0


def x0_from_flow(x_t: Tensor, flow: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    return (x_t - sigma * flow) / (alpha + sigma)  # which is 1 on the straight path


def eps_from_flow(x_t: Tensor, flow: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    return (x_t + alpha * flow) / (alpha + sigma)


def score_from_eps(eps: Tensor, sigma: Tensor) -> Tensor:
    return -eps / sigma


def eps_from_score(score: Tensor, sigma: Tensor) -> Tensor:
    return -sigma * score


def target(kind: Prediction, x0: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """What a network of this kind should have answered for the pair (x0, eps)."""
    if kind == "eps":
        return eps
    if kind == "x0":
        return x0
    if kind == "v":
        return v_from(x0, eps, alpha, sigma)
    if kind == "flow":
        return eps - x0
    raise ValueError(f"prediction: expected eps, x0, v or flow, got {kind!r}")


def to_eps(kind: Prediction, output: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """A network's answer of any kind => pred_eps."""
    if kind == "eps":
        return output
    if kind == "x0":
        return eps_from_x0(x_t, output, alpha, sigma)
    if kind == "v":
        return eps_from_v(x_t, output, alpha, sigma)
    if kind == "flow":
        return eps_from_flow(x_t, output, alpha, sigma)
    raise ValueError(f"prediction: expected eps, x0, v or flow, got {kind!r}")


def to_x0(kind: Prediction, output: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """A network's answer of any kind => pred_x0."""
    if kind == "eps":
        return x0_from_eps(x_t, output, alpha, sigma)
    if kind == "x0":
        return output
    if kind == "v":
        return x0_from_v(x_t, output, alpha, sigma)
    if kind == "flow":
        return x0_from_flow(x_t, output, alpha, sigma)
    raise ValueError(f"prediction: expected eps, x0, v or flow, got {kind!r}")


def to_v(kind: Prediction, output: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """A network's answer of any kind => pred_v."""
    if kind == "eps":
        return v_from_eps(x_t, output, alpha, sigma)
    if kind == "x0":
        return v_from_x0(x_t, output, alpha, sigma)
    if kind == "v":
        return output
    if kind == "flow":
        x0, eps = x0_from_flow(x_t, output, alpha, sigma), eps_from_flow(x_t, output, alpha, sigma)
        return v_from(x0, eps, alpha, sigma)
    raise ValueError(f"prediction: expected eps, x0, v or flow, got {kind!r}")


def to_flow(kind: Prediction, output: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """A network's answer of any kind => pred_eps - pred_x0."""
    if kind == "flow":
        return output
    return to_eps(kind, output, x_t, alpha, sigma) - to_x0(kind, output, x_t, alpha, sigma)


def add_to_score(kind: Prediction, output: Tensor, change: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """A network's answer of any kind, as it would be if the score were larger by `change`, at the same x_t.

    eps moves by -sigma change. At one x_t, x0, v and flow follow eps with slopes -sigma / alpha, 1 / alpha and
    (alpha + sigma) / alpha. Where alpha
    is 0 x_t says nothing about x0, no condition has a gradient there, and x0 and v stay what they are.
    """
    if kind == "eps":
        return output - sigma * change
    per_alpha = torch.where(alpha > 0, 1 / alpha, 0)
    if kind == "x0":
        return output + sigma**2 * per_alpha * change
    if kind == "v":
        return output - sigma * per_alpha * change
    if kind == "flow":
        return output - sigma * (alpha + sigma) * per_alpha * change
    raise ValueError(f"prediction: expected eps, x0, v or flow, got {kind!r}")
