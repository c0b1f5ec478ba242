"""Which timesteps to train on: a uniform number u in [0, 1) => t, and the weight that corrects for its choice.

Uniform t is the objective as it is written. Any other distribution p_t either says openly that it is another
objective (logit-normal) or corrects for itself: the mean over t of L_t is also the mean under p of L_t / (T p_t)
(importance sampling). The estimate's variance is least where p_t is proportional to sqrt(E[L_t**2]) (Nichol & Dhariwal
2021, eq. 18). It matters for L_vlb, whose terms differ by orders of magnitude, and hardly for L_simple. The moments
aren't known, so the last few losses of each t stand in for them, and until each t has as many the draw is uniform.

All of them invert their distribution function at u, so that whoever owns chance keeps it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

#: u float64 [B] in [0, 1) => t int64 [B] and the weight of the loss there, float64 [B].
TimestepSampler = Callable[[Tensor], tuple[Tensor, Tensor]]


def uniform(T: int) -> TimestepSampler:
    """Every t in [0, T) alike."""
    return lambda u: (at_share(u, T), torch.ones_like(u))


def shifted(sampler: TimestepSampler, T: int, shift: float) -> TimestepSampler:
    """Another's t, moved towards noise as `RectifiedFlow.shift` moves a sampler's steps (Esser et al. 2024, eq. 23)."""

    def moved(u: Tensor) -> tuple[Tensor, Tensor]:
        t, weight = sampler(u)
        s = (t.double() + 0.5) / T
        return at_share(shift * s / (1 + (shift - 1) * s), T), weight

    return sampler if shift == 1 else moved


def logit_normal(T: int, mean: float = 0.0, std: float = 1.0) -> TimestepSampler:
    """The logit of t / T is N(mean, std**2): the middle of the chain more often (Esser et al. 2024, eq. 19).

    Another objective, not another estimate of the same one: the weight is 1.
    """
    return lambda u: (at_share((mean + std * torch.special.ndtri(u)).sigmoid(), T), torch.ones_like(u))


def among(steps: Sequence[int]) -> TimestepSampler:
    """Each of these alike, and no other: a network of few steps needs no answer at a t that it never meets."""
    table = torch.tensor(steps, dtype=torch.int64)
    return lambda u: (table[at_share(u, len(table))], torch.ones_like(u))


def at_share(share: Tensor, T: int) -> Tensor:
    """How far along the chain, in [0, 1] => t, int64 in [0, T)."""
    return (share * T).long().clamp(max=T - 1)


class LossSecondMoment(nn.Module):
    """Samples t where the loss is large, with the weight that corrects for it.

    A module only so that its history is saved, restored and moved with the model's.

    Args:
        T: number of timesteps.
        history: how many losses to remember of each t.
        uniform: the share of samples that stay uniform, so that every t is learned.
    """

    losses: Tensor
    count: Tensor

    def __init__(self, T: int, *, history: int = 10, uniform: float = 0.001) -> None:
        super().__init__()
        self.uniform = uniform
        self.register_buffer("losses", torch.zeros(T, history, dtype=torch.float64))  # (T, history)
        self.register_buffer("count", torch.zeros(T, dtype=torch.int64))  # (T,)

    def probabilities(self) -> Tensor:
        """p_t, float64 [T]; sums to 1."""
        T, history = self.losses.shape
        if int(self.count.min()) < history:
            return torch.full_like(self.losses[:, 0], 1 / T)
        root = self.losses.square().mean(1).sqrt()  # eq. 18
        if float(root.sum()) == 0:
            return torch.full_like(root, 1 / T)
        return (1 - self.uniform) * root / root.sum() + self.uniform / T

    def forward(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """u in [0, 1), float64 [B] => t, int64 [B], and the weight of the loss at t, 1 / (T p_t), float64 [B]."""
        p = self.probabilities()
        t = torch.searchsorted(p.cumsum(0), u, right=True).clamp(max=len(p) - 1)
        return t, 1 / (len(p) * p[t])

    @torch.no_grad()
    def update(self, t: Tensor, loss: Tensor) -> None:
        """Remember the unweighted losses [B] found at t [B]; the oldest make room."""
        history = self.losses.shape[1]
        for step, value in zip(t.tolist(), loss.tolist(), strict=True):
            self.losses[step, int(self.count[step]) % history] = value
            self.count[step] += 1
