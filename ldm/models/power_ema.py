"""Averages of weights whose width is chosen after training (Karras et al. 2024, "Analyzing and Improving the Training
Dynamics of Diffusion Models", section 3 and appendix C).

A power-function average gives the weights of step tau, at step t, a share that grows as tau**gamma:

    average(t) = sum over tau = 1..t of p(tau; t) weights(tau)
    p(tau; t)  = (tau**(gamma + 1) - (tau - 1)**(gamma + 1)) / t**(gamma + 1)

which is eq. 3 integrated over each step, and what this recursion gives, exactly (eq. 4):

    average(t) = beta average(t - 1) + (1 - beta) weights(t)        beta = (1 - 1/t)**(gamma + 1)

Its shape is the same at every t, its width a share of the training: `width` is the standard deviation of tau / t
(the paper's sigma_rel), 0.05 to 0.1 for a good one. It forgets where training began, since beta is 0 at t = 1.

Snapshots of two such averages, taken now and then, hold more than themselves. A profile p that was not kept is nearly a
combination of those that were, and the same combination of the snapshots is nearly its average. `coefficients` finds
it by least squares.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

#: The width of gamma = 0, at which every step counts alike: sqrt(1 / 12).
WIDEST = math.sqrt(1 / 12)
BINS = 4096  # of a long training's steps


def exponent(width: float) -> float:
    """gamma of a width in (0, WIDEST], the positive root of (g + 1) / ((g + 2)**2 (g + 3)) = width**2 (algorithm 2).

    Raises:
        ValueError: for a width outside.
    """
    if not 0 < width <= WIDEST:
        raise ValueError(f"width: expected above 0 and at most {WIDEST:.4f}, got {width}")
    w = width**-2  # g**3 + 7 g**2 + (16 - w) g + (12 - w) = 0, whose other roots are negative
    low, high = 0.0, 1 / width  # of a cubic that is negative, or 0, at the lower end
    for _ in range(200):
        middle = (low + high) / 2
        cubic = ((middle + 7) * middle + 16 - w) * middle + 12 - w
        low, high = (middle, high) if cubic <= 0 else (low, middle)
    return (low + high) / 2


def width_of(gamma: float) -> float:
    """The inverse of `exponent`: the standard deviation of tau / t, whose density is (gamma + 1) tau**gamma."""
    return math.sqrt((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3)))


def width_name(width: float) -> str:
    """A width in the names of files: 0.05."""
    return f"{width:g}"


def decay(step: int, gamma: float) -> float:
    """beta of a step, counted from 1."""
    return (1 - 1 / step) ** (gamma + 1)


def profile(edges: Tensor, step: int, gamma: float) -> Tensor:
    """The shares of the steps in (edges[k], edges[k + 1]], float64 [n]; 0 after `step`.

    Args:
        edges: whole numbers of steps as float64 [n + 1], ascending.
    """
    return (edges.clamp(max=step) / step).pow(gamma + 1).diff()


def coefficients(kept: Sequence[tuple[int, float]], step: int, gamma: float) -> tuple[Tensor, float]:
    """The combination of snapshots that is nearest to the average of (step, gamma).

    Nearest means the least squared difference of the profiles (appendix C.3), among combinations whose shares sum to 1
    as every profile's do: what all steps have in common comes out exactly.

    Args:
        kept: (step, gamma) of each snapshot; those after `step` don't help.
    Returns:
        float64 [n], which sum to 1; and how much of the profile is left, sqrt of the squared difference over its own
        square.
    """
    edges = torch.linspace(0, step, min(step, BINS) + 1, dtype=torch.float64).round()
    edges = torch.cat([edges, torch.tensor([t for t, _ in kept if t < step], dtype=torch.float64)]).unique()
    per_step = edges.diff().sqrt()  # squares are summed over steps, and a bin's steps share what it has
    wanted = profile(edges, step, gamma) / per_step  # (n,)
    found = torch.stack([profile(edges, t, g) for t, g in kept], dim=1) / per_step[:, None]  # (n, snapshots)
    nearest = int((found - wanted[:, None]).square().sum(0).argmin())  # it has share 1, and what others get is taken
    others = [i for i in range(len(kept)) if i != nearest]
    shares = torch.zeros(len(kept), dtype=torch.float64)
    if others:
        differences = found[:, others] - found[:, nearest : nearest + 1]
        solved = torch.linalg.lstsq(differences, (wanted - found[:, nearest])[:, None], driver="gelsd", rcond=1e-10)
        shares[others] = solved.solution[:, 0]
    shares[nearest] = 1 - shares.sum()
    left = (found @ shares - wanted).square().sum().sqrt() / wanted.square().sum().sqrt()
    return shares, float(left)
