"""Which timesteps to train on: importance sampling by the second moment of the loss.

The mean over t of L_t is also the mean under any other distribution p of L_t / (T p_t). The estimate's variance
is least where p_t is proportional to sqrt(E[L_t**2]) (Nichol & Dhariwal 2021, eq. 18). It matters for L_vlb,
whose terms differ by orders of magnitude, and hardly for L_simple. The moments aren't known, so the last few
losses of each t stand in for them, and until each t has as many the draw is uniform.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class LossSecondMoment(nn.Module):
    """Draws t where the loss is large, and says with what weight to correct for it.

    A module only so that its history is saved, restored and moved with the model's.

    Args:
        T: number of timesteps.
        history: how many losses to remember of each t.
        uniform: the share of draws that stay uniform, so that no t is forgotten.
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

    def sample(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw n timesteps.

        Args:
            generator: on the device of this module.
        Returns:
            t: int64 [n]; weight: float64 [n], 1 / (T p_t), the factor of the loss at t.
        """
        p = self.probabilities()
        t = torch.multinomial(p, n, replacement=True, generator=generator)
        return t, 1 / (len(p) * p[t])

    @torch.no_grad()
    def update(self, t: Tensor, loss: Tensor) -> None:
        """Remember the unweighted losses [B] found at t [B]; the oldest make room."""
        history = self.losses.shape[1]
        for step, value in zip(t.tolist(), loss.tolist(), strict=True):
            self.losses[step, int(self.count[step]) % history] = value
            self.count[step] += 1
