"""The loss on held-out pictures at fixed (picture, t, eps): the one curve that says whether a model learns.

The training loss is taken at random t, whose spread hides months of progress. Here nothing is random: every
picture is noised at four timesteps, one in each quarter of [0, T), with the same noise each time, so two
values differ only because the network does. Always the unweighted squared error of eps, whatever the
network predicts, so that runs with other objectives can be compared.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.diffusion.forward import q_sample
from ldm.diffusion.parameterization import Prediction, to_eps
from ldm.diffusion.schedule import NoiseSchedule
from ldm.models.conditioning import Conditioning

QUARTERS = 4
#: (x_t [B,C,h,w], t [B] on the CPU, what is told of the pictures) => prediction, shaped like x_t.
Network = Callable[[Tensor, Tensor, Conditioning], Tensor]


@dataclass(frozen=True)
class HeldOut:
    """Fixed questions: x0 [B,C,h,w], what is told of it, t int64 [4,B] (one row a quarter), eps [4,B,C,h,w]."""

    x0: Tensor
    conditioning: Conditioning
    t: Tensor
    eps: Tensor

    @classmethod
    def fixed(cls, x0: Tensor, conditioning: Conditioning, T: int, generator: torch.Generator) -> HeldOut:
        """Questions about these latents, with t and eps drawn once from the generator (a CPU one)."""
        t, eps = fixed_noise(x0, T, generator)
        return cls(x0, conditioning, t, eps)


def fixed_noise(x0: Tensor, T: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """One timestep in each quarter of [0, T) for each of x0 [B,...], and its noise: int64 [4,B], [4,B,...]."""
    edges = [T * i // QUARTERS for i in range(QUARTERS + 1)]
    t = torch.stack(
        [
            torch.randint(low, max(low + 1, high), (len(x0),), generator=generator)
            for low, high in zip(edges[:-1], edges[1:], strict=True)
        ]
    )
    return t, torch.randn(QUARTERS, *x0.shape, generator=generator).to(x0.device)


@torch.no_grad()
def squared_errors(
    network: Network,
    schedule: NoiseSchedule,
    prediction: Prediction,
    questions: HeldOut,
    batch_size: int = 64,
) -> Tensor:
    """The mean squared error of eps of every question, float32 [4,B] on the CPU, one row a quarter of t."""
    by_quarter = []
    for t, eps in zip(questions.t, questions.eps, strict=True):
        errors = []
        for part in torch.arange(len(questions.x0)).split(batch_size):
            x0, noise = questions.x0[part], eps[part]
            x_t = q_sample(schedule, x0, t[part], noise)
            output = network(x_t, t[part], questions.conditioning[part]).float()
            alpha, sigma = schedule.at(t[part], x0)
            errors.append((to_eps(prediction, output, x_t, alpha, sigma) - noise).square().flatten(1).mean(1))
        by_quarter.append(torch.cat(errors).cpu())
    return torch.stack(by_quarter)


def by_quarter(errors: Tensor) -> dict[str, float]:
    """Errors [4,B] => {"total": ..., "q1": ..., "q4": ...}, their means; q1 is the quarter with the least noise."""
    quarters = errors.mean(1).tolist()
    return {"total": sum(quarters) / QUARTERS, **{f"q{i + 1}": value for i, value in enumerate(quarters)}}
