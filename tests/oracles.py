"""Data whose diffusion is known in closed form: Gaussian mixtures, in float64.

If x0 ~ sum_k w_k N(m_k, C_k) and x = alpha x0 + sigma eps, then x is the mixture of the normals
N(alpha m_k, alpha**2 C_k + sigma**2 I), and given x and k, x0 is normal as well. So the density, the score,
E[x0 | x] and Var[x0 | x] at every noise level are exact, and with them the network that training should end at.
`test_oracles.py` checks them against numerical integration, by other formulas than these.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import hypothesis
import torch
from torch import Tensor

from ldm.diffusion.parameterization import Prediction
from ldm.diffusion.reverse import Denoiser
from ldm.diffusion.schedule import NoiseSchedule

# The same examples in every run, and no verdict on how fast a shared machine is.
hypothesis.settings.register_profile("theory", deadline=None, derandomize=True, max_examples=60)
hypothesis.settings.load_profile("theory")

SCHEDULES = {
    "linear": NoiseSchedule.linear(),
    "scaled_linear": NoiseSchedule.scaled_linear(),
    "cosine": NoiseSchedule.cosine(),
    "sigmoid": NoiseSchedule.sigmoid(),
    "variance_exploding": NoiseSchedule.variance_exploding(),
    "zero_snr": NoiseSchedule.scaled_linear().rescale_zero_terminal_snr(),
}
PREDICTIONS: tuple[Prediction, ...] = ("eps", "x0", "v")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def double(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


@dataclass(frozen=True, eq=False)
class Mixture:
    """sum_k weights[k] N(means[k], covs[k]); weights [K], means [K, d], covs [K, d, d], all float64."""

    weights: Tensor
    means: Tensor
    covs: Tensor

    @cached_property
    def eigen(self) -> tuple[Tensor, Tensor]:
        return torch.linalg.eigh(self.covs)  # values (K, d), vectors (K, d, d), in columns

    @property
    def dim(self) -> int:
        return self.means.shape[1]

    @property
    def mean(self) -> Tensor:
        return self.weights @ self.means  # (d,)

    @property
    def cov(self) -> Tensor:
        centered = self.means - self.mean
        return torch.einsum("k,kij->ij", self.weights, self.covs + centered[:, :, None] * centered[:, None, :])

    def sample(self, n: int, rng: torch.Generator) -> Tensor:
        k = torch.multinomial(self.weights, n, replacement=True, generator=rng)
        values, vectors = self.eigen
        x = torch.randn(n, self.dim, generator=rng, dtype=torch.float64)
        for i in range(len(self.weights)):
            x[k == i] = self.means[i] + (x[k == i] * values[i].sqrt()) @ vectors[i].T
        return x

    def components(self, x: Tensor, alpha: Tensor | float, sigma: Tensor | float) -> tuple[Tensor, Tensor, Tensor]:
        """For x [B, d] at (alpha, sigma), numbers or [B, 1]: log w_k p_k(x) [B, K]; E[x0 | x, k] and
        the eigenvalues of Var[x0 | x, k], each [B, K, d]."""
        alpha = torch.as_tensor(alpha, dtype=torch.float64).reshape(-1, 1, 1)
        sigma = torch.as_tensor(sigma, dtype=torch.float64).reshape(-1, 1, 1)
        values, vectors = self.eigen
        var = alpha**2 * values + sigma**2  # (B, K, d)
        centered = torch.einsum("bkj,kji->bki", x[:, None, :] - alpha * self.means, vectors)  # along the eigenvectors
        log_p = self.weights.log() - 0.5 * (centered**2 / var + var.log() + math.log(2 * math.pi)).sum(-1)
        x0 = self.means + torch.einsum("bki,kji->bkj", alpha * values / var * centered, vectors)
        return log_p, x0, values * sigma**2 / var

    def log_prob(self, x: Tensor, alpha: Tensor | float = 1.0, sigma: Tensor | float = 0.0) -> Tensor:
        return self.components(x, alpha, sigma)[0].logsumexp(1)  # (B,)

    def responsibilities(self, x: Tensor, alpha: Tensor | float = 1.0, sigma: Tensor | float = 0.0) -> Tensor:
        return self.components(x, alpha, sigma)[0].softmax(1)  # (B, K)

    def denoise(self, x: Tensor, alpha: Tensor | float, sigma: Tensor | float) -> Tensor:
        """E[x0 | x], [B, d]."""
        log_p, x0, _ = self.components(x, alpha, sigma)
        return torch.einsum("bk,bkd->bd", log_p.softmax(1), x0)

    def total_variance(self, x: Tensor, alpha: Tensor | float, sigma: Tensor | float) -> Tensor:
        """tr Var[x0 | x], [B]: the least squared error with which x0 can be told from x."""
        log_p, x0, var = self.components(x, alpha, sigma)
        mean = torch.einsum("bk,bkd->bd", log_p.softmax(1), x0)
        return (log_p.softmax(1) * (var + (x0 - mean[:, None]) ** 2).sum(-1)).sum(1)

    def score(self, x: Tensor, alpha: Tensor | float, sigma: Tensor | float) -> Tensor:
        """grad log p(x), differentiated: independent of `denoise`."""
        x = x.detach().requires_grad_()
        return torch.autograd.grad(self.log_prob(x, alpha, sigma).sum(), x)[0]

    def cdf(self, x: Tensor, alpha: float = 1.0, sigma: float = 0.0) -> Tensor:
        """The distribution function, of data on a line; x [B, 1] => [B, 1]."""
        std = (alpha**2 * self.covs[:, 0, 0] + sigma**2).sqrt()
        return torch.special.ndtr((x - alpha * self.means[:, 0]) / std) @ self.weights[:, None]

    def transport(self, x: Tensor, start: tuple[float, float], end: tuple[float, float] = (1.0, 0.0)) -> Tensor:
        """Where the probability-flow ODE takes x [B, 1], of data on a line, from one (alpha, sigma) to another.

        On a line curves can't cross, so each keeps its quantile: no integration needed, only bisection.
        """
        quantile = self.cdf(x, *start)
        low, high = torch.full_like(x, -20.0), torch.full_like(x, 20.0)
        for _ in range(70):
            middle = (low + high) / 2
            below = self.cdf(middle, *end) < quantile
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return (low + high) / 2

    def network(self, schedule: NoiseSchedule, prediction: Prediction) -> Callable[[Tensor, Tensor], Tensor]:
        """The network that training should end at, for x_t [B, ...] of d elements; as finely typed as x_t."""

        def forward(x_t: Tensor, t: Tensor) -> Tensor:
            x = x_t.double().flatten(1)
            alpha, sigma = schedule.alpha[t.long()][:, None], schedule.sigma[t.long()][:, None]
            x0 = self.denoise(x, alpha, sigma)
            eps = (x - alpha * x0) / sigma
            answer = {"x0": x0, "eps": eps, "v": (alpha * x - x0) / sigma, "flow": eps - x0}[prediction]
            return answer.reshape(x_t.shape).to(x_t)

        return forward

    def denoiser(self, schedule: NoiseSchedule, prediction: Prediction = "v") -> Denoiser:
        return Denoiser(self.network(schedule, prediction), schedule, prediction)

    def exact_reverse(self, schedule: NoiseSchedule) -> Denoiser:
        """Of one Gaussian of diagonal covariance: p(x_s | x_t) = q(x_s | x_t) for s = t - 1, by learned variance.

        Var[x_s | x_t] = beta_tilde + x0_factor**2 Var[x0 | x_t]: what is open given x0, and what x0 leaves open.
        """
        assert len(self.weights) == 1
        mean_network = self.network(schedule, "v")
        std = self.covs[0].diagonal()

        def forward(x_t: Tensor, t: Tensor) -> Tensor:
            before = torch.cat([torch.ones(1, dtype=torch.float64), schedule.alpha_bar])[t]
            now, beta = schedule.alpha_bar[t], schedule.betas[t]
            beta_tilde = beta * (1 - before) / (1 - now)
            open_x0 = std * ((1 - now) / (now * std[:, None] + 1 - now)).T  # (B, d)
            exact = beta_tilde[:, None] + (before.sqrt() * beta / (1 - now))[:, None] ** 2 * open_x0
            floor = schedule.betas[1] * (1 - schedule.alpha_bar[0]) / (1 - schedule.alpha_bar[1])
            lower = torch.where(t > 0, beta_tilde, floor).log()[:, None]
            upper = beta.log()[:, None]
            fraction = 2 * (exact.log() - lower) / (upper - lower) - 1
            return torch.cat([mean_network(x_t, t), fraction], dim=1)

        return Denoiser(forward, schedule, "v", "learned")


def gaussian(mean: list[float], std: list[float]) -> Mixture:
    return Mixture(double([1.0]), double([mean]), double(std).square().diag()[None])


def line() -> Mixture:
    """Three components on a line: unequal in weight, width and distance."""
    covs = [[[0.09]], [[0.16]], [[0.04]]]
    return Mixture(double([0.5, 0.3, 0.2]), double([[-1.2], [0.4], [1.6]]), double(covs))


def plane() -> Mixture:
    """Three components in the plane, tilted, no two alike."""
    covs = [[[0.20, 0.08], [0.08, 0.10]], [[0.10, -0.05], [-0.05, 0.15]], [[0.06, 0.0], [0.0, 0.12]]]
    return Mixture(double([0.5, 0.3, 0.2]), double([[-1.0, -0.5], [1.2, 0.3], [0.0, 1.5]]), double(covs))


def space(dim: int = 64) -> Mixture:
    """Two components in many dimensions, with correlated neighbors and a spectrum of widths."""
    rng = generator(64)
    means = torch.randn(2, dim, generator=rng, dtype=torch.float64) * 0.5
    rotation = torch.linalg.qr(torch.randn(dim, dim, generator=rng, dtype=torch.float64))[0]
    covs = [rotation @ torch.linspace(low, 0.8, dim, dtype=torch.float64).diag() @ rotation.T for low in (0.05, 0.2)]
    return Mixture(double([0.6, 0.4]), means, torch.stack(covs))


def hermite(n: int) -> tuple[Tensor, Tensor]:
    """Nodes and weights [n] with sum w f(z) = E f(Z), Z standard normal: exact for polynomials below degree 2n."""
    i = torch.arange(1, n, dtype=torch.float64).sqrt()
    nodes, vectors = torch.linalg.eigh(torch.diag(i, 1) + torch.diag(i, -1))  # Golub & Welsch 1969
    return nodes, vectors[0] ** 2


def expectation_grid(data: Mixture, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """x0 [N, 1], eps [N, 1] and weights [N] with sum w f(x0, eps) = E f(x0, eps), for data on a line."""
    z, w = hermite(n)
    x0 = data.means + data.covs[:, 0].sqrt() * z  # (K, n)
    mass = data.weights[:, None] * w
    pairs = torch.cartesian_prod(x0.flatten(), z)
    return pairs[:, :1], pairs[:, 1:], (mass.flatten()[:, None] * w).flatten()


def assert_drawn_from(x: Tensor, data: Mixture, bias: float = 0.0, level: float = 1e-3) -> None:
    """The mean, covariance and component weights of samples x [N, d] are those of `data`.

    Every statistic is the average over the samples of some number, so its standard error is the deviation
    of that number / sqrt(N). None may be further off than the largest of that many normal errors is but with
    probability `level`, plus `bias` standard deviations of the number: the allowance for a step size.
    """
    assert x.isfinite().all()
    centered = x - data.mean
    pairs = torch.triu_indices(data.dim, data.dim)
    numbers = [
        (centered, torch.zeros(data.dim, dtype=x.dtype)),
        (centered[:, pairs[0]] * centered[:, pairs[1]], data.cov[pairs[0], pairs[1]]),
        (data.responsibilities(x), data.weights),
    ]
    found = torch.cat([n for n, _ in numbers], dim=1)  # (N, statistics)
    expected = torch.cat([e for _, e in numbers])
    std = found.std(0) + 1e-12
    bound = torch.special.ndtri(torch.tensor(1 - level / (2 * len(expected)), dtype=torch.float64))
    error = (found.mean(0) - expected).abs() / std
    i = int(error.argmax())
    assert float(error[i]) <= float(bound) / len(x) ** 0.5 + bias, (
        f"statistic {i} of {len(expected)} is {float(found[:, i].mean()):.5f}, expected {float(expected[i]):.5f}: "
        f"{float(error[i]) * len(x) ** 0.5:.1f} standard errors off, allowed {float(bound):.1f} and a bias of {bias}"
    )


def order_of(errors: list[float]) -> float:
    """The power p of error ~ steps**-p, from errors at doubling numbers of steps, by the last two."""
    return math.log2(errors[-2] / errors[-1])
