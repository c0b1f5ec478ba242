"""The forward process: how a clean sample drowns in noise.

    one step     q(x_t | x_{t-1}) = N(sqrt(1 - beta_t) x_{t-1}, beta_t I)     (Ho et al. 2020, eq. 2)
    all at once  q(x_t | x0)      = N(alpha_t x0, sigma_t**2 I)               (eq. 4)

The second is the first applied t + 1 times; `schedule` shows why. The noise always comes in from
outside, so what is drawn is a function of the arguments.
"""

from __future__ import annotations

from torch import Tensor

from ldm.diffusion.schedule import NoiseSchedule, gather


def q_step(schedule: NoiseSchedule, x_prev: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """Sample x_t ~ q(x_t | x_{t-1}), one step of a chain that preserves variance, as all but rectified flow do.

    Args:
        x_prev: [B, ...] x_{t-1}; the clean x0 where t is 0.
        t: int64 [B] in [0, T).
        noise: standard normal, shaped like x_prev.
    Returns:
        x_t, shaped like x_prev.
    """
    beta = gather(schedule.betas, t, x_prev)
    return (1 - beta).sqrt() * x_prev + beta.sqrt() * noise  # eq. 2


def q_sample(schedule: NoiseSchedule, x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
    """Sample x_t ~ q(x_t | x0) with the given noise.

    Args:
        x0: [B, ...] clean latents.
        t: int64 [B] in [0, T).
        eps: standard normal noise, shaped like x0.
    Returns:
        x_t, shaped like x0.
    """
    alpha, sigma = schedule.at(t, x0)
    return alpha * x0 + sigma * eps  # eq. 4
