"""Every objective ends at the exact denoiser: its gradient is zero there, and descent arrives there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import (
    PREDICTIONS,
    SCHEDULES,
    Mixture,
    double,
    expectation_grid,
    gaussian,
    generator,
    hermite,
    line,
    plane,
    randn,
    space,
)
from torch import Tensor

from ldm.diffusion import forward, likelihood
from ldm.diffusion import losses as objective
from ldm.diffusion import parameterization as prediction
from ldm.diffusion.parameterization import Prediction
from ldm.diffusion.reverse import Denoiser
from ldm.diffusion.schedule import NoiseSchedule

SCHEDULE = NoiseSchedule.linear()
Network = Callable[[Tensor, Tensor], Tensor]
#: (network, prediction, x0, t, eps) => loss of each sample.
Objective = Callable[[Network, Prediction, Tensor, Tensor, Tensor], Tensor]


def weighted(**options: Any) -> Objective:
    return lambda f, kind, x0, t, eps: objective.diffusion_loss(f, SCHEDULE, x0, t, eps, prediction=kind, **options)


def vlb(f: Network, kind: Prediction, x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
    return objective.vlb_loss(Denoiser(f, SCHEDULE, kind), x0, t, eps)


def hybrid(f: Network, kind: Prediction, x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
    def with_variance(x: Tensor, t: Tensor) -> Tensor:
        return torch.cat([f(x, t), torch.zeros_like(x)], 1)

    return objective.hybrid_loss(Denoiser(with_variance, SCHEDULE, kind, "learned"), x0, t, eps)


def score_matching(f: Network, kind: Prediction, x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
    return objective.score_matching_loss(Denoiser(f, SCHEDULE, kind).score, SCHEDULE, x0, t, eps)


LEAST_SQUARES: dict[str, Objective] = {
    "simple": weighted(),
    "min_snr": weighted(weighting=objective.min_snr()),
    "truncated_snr": weighted(weighting=objective.truncated_snr()),
    "p2": weighted(weighting=objective.p2()),
    "vlb": vlb,
    "hybrid": hybrid,
    "score_matching": score_matching,
}


def features(x: Tensor) -> Tensor:
    parts = [torch.ones_like(x), x, x**2, (3 * x).sin(), (2 * x).tanh(), x.roll(1, dims=1).cos()]
    return torch.stack(parts)  # (6, N, d)


def gradient_norm(loss: Objective, network: Network, kind: Prediction, grid: Any, t: int) -> tuple[float, float]:
    """The gradient of the expected loss along the features, in each dimension, at `network`; and the loss."""
    x0, eps, w = grid
    theta = torch.zeros(6, 1, x0.shape[1], dtype=torch.float64, requires_grad=True)
    moved = lambda x, ts: network(x, ts) + (features(x) * theta).sum(0)  # noqa: E731
    value = loss(moved, kind, x0, torch.full((len(x0),), t), eps) @ w
    (gradient,) = torch.autograd.grad(value, theta)
    return float(gradient.abs().max()), value.item()


def posterior_grid(data: Mixture, t: int, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """Pairs (x0, eps) and weights for n draws of x_t: given x_t, x0 is the mean of a component, as likely as it is.

    Least squares is quadratic in x0, so its gradient sees x0 through E[x0 | x_t] only, which these few points carry.
    """
    alpha, sigma = float(SCHEDULE.alpha[t]), float(SCHEDULE.sigma[t])
    x_t = (alpha * data.sample(n, generator(1)) + sigma * randn(n, data.dim, seed=2))[:, None]
    log_p, x0, _ = data.components(x_t[:, 0], alpha, sigma)  # (n, K), (n, K, d)
    eps = (x_t - alpha * x0) / sigma
    return x0.flatten(0, 1), eps.flatten(0, 1), log_p.softmax(1).flatten() / n


DATA = {1: line(), 2: plane(), 64: space()}
GRID = expectation_grid(line(), 80)


@pytest.mark.parametrize("name", LEAST_SQUARES)
@pytest.mark.parametrize("kind", PREDICTIONS)
@pytest.mark.parametrize("t", [20, 300, 700])
@pytest.mark.parametrize("dim", DATA)
def test_gradient_is_zero_at_the_exact_denoiser(name: str, kind: Prediction, t: int, dim: int) -> None:
    """In whatever direction the network moves; and isn't zero next to it."""
    exact = DATA[dim].network(SCHEDULE, kind)
    grid = GRID if dim == 1 else posterior_grid(DATA[dim], t, 50)
    gradient, value = gradient_norm(LEAST_SQUARES[name], exact, kind, grid, t)
    nearby, worse = gradient_norm(LEAST_SQUARES[name], lambda x, ts: exact(x, ts) + 0.1 * x, kind, grid, t)
    assert gradient < 1e-4 * nearby
    assert worse > value


@pytest.mark.parametrize("t", [0, 1, 20, 300, 700, 999])
def test_gradient_of_the_bound_is_zero_at_the_exact_reverse_step(t: int) -> None:
    """With learned variance L_vlb moves both halves of the answer, on a Gaussian to p(x_s | x_t) = q(x_s | x_t)."""
    data = gaussian([0.7], [0.5])
    z, w = hermite(40)
    pairs = torch.cartesian_prod(z, z)
    grid = 0.7 + 0.5 * pairs[:, :1], pairs[:, 1:], torch.outer(w, w).flatten()
    exact = data.exact_reverse(SCHEDULE).network

    def bound(half: int) -> Objective:
        """The network handed in answers one half, the exact one the other."""

        def loss(f: Network, kind: Prediction, x0: Tensor, ts: Tensor, eps: Tensor) -> Tensor:
            def network(x: Tensor, ts: Tensor) -> Tensor:
                halves = list(exact(x, ts).chunk(2, 1))
                halves[half] = f(x, ts)
                return torch.cat(halves, 1)

            return objective.vlb_loss(Denoiser(network, SCHEDULE, kind, "learned"), x0, ts, eps)

        return loss

    for half in (0, 1):

        def moved(by: float, half: int = half) -> Network:
            return lambda x, ts: exact(x, ts)[:, half : half + 1] + by

        gradient, value = gradient_norm(bound(half), moved(0.0), "v", grid, t)
        nearby, worse = gradient_norm(bound(half), moved(0.1), "v", grid, t)
        assert gradient < 1e-3 * nearby
        assert worse > value


# --- the absolute error ------------------------------------------------------------------------


def median_grid(data: Mixture, t: int, n: int = 200) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pairs (x0, eps) and weights, for x_t at 60 of its quantiles and x0 at n of its own, given x_t; and the x_t."""
    alpha, sigma = float(SCHEDULE.alpha[t]), float(SCHEDULE.sigma[t])
    x_t = data.transport(torch.linspace(-2, 2, 60, dtype=torch.float64)[:, None], (0.0, 1.0), (alpha, sigma))
    x0 = posterior_quantiles(data, x_t, t, (torch.arange(n, dtype=torch.float64) + 0.5) / n)
    x0, x_t = x0.reshape(-1, 1), x_t.repeat_interleave(n, 0)
    return x0, (x_t - alpha * x0) / sigma, torch.full((len(x0),), 1 / len(x0), dtype=torch.float64), x_t


def posterior_quantiles(data: Mixture, x_t: Tensor, t: int, shares: Tensor) -> Tensor:
    """The x0 [B, n] below which lie these shares [n] of q(x0 | x_t), for x_t [B, 1], by bisection."""
    log_p, mean, var = data.components(x_t, float(SCHEDULE.alpha[t]), float(SCHEDULE.sigma[t]))
    weights, std = log_p.softmax(1)[..., None], var.sqrt()  # (B, K, 1)
    low, high = torch.full((len(x_t), len(shares)), -20.0).double(), torch.full((len(x_t), len(shares)), 20.0).double()
    for _ in range(60):
        middle = (low + high) / 2
        below = (weights * torch.special.ndtr((middle[:, None] - mean) / std)).sum(1) < shares
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return middle


def median_network(data: Mixture, kind: Prediction) -> Network:
    """The median of the target given x_t: that of x0 and, each prediction being monotonic in x0, of all."""

    def network(x: Tensor, ts: Tensor) -> Tensor:
        alpha, sigma = SCHEDULE.at(ts[:1], x)
        x0 = posterior_quantiles(data, x, int(ts[0]), double([0.5]))
        return prediction.target(kind, x0, (x - alpha * x0) / sigma, alpha, sigma)

    return network


@pytest.mark.parametrize("kind", PREDICTIONS)
@pytest.mark.parametrize("t", [100, 400, 999])
def test_gradient_of_the_absolute_error_is_zero_at_the_median(kind: Prediction, t: int) -> None:
    """On a mixture, where the exact denoiser of least squares is another network."""
    data = line()
    *grid, _ = median_grid(data, t)
    gradient, value = gradient_norm(weighted(norm="l1"), median_network(data, kind), kind, grid, t)
    at_mean, worse = gradient_norm(weighted(norm="l1"), data.network(SCHEDULE, kind), kind, grid, t)
    assert gradient < 1e-9 and at_mean > 1e-3
    assert worse > value


@pytest.mark.parametrize("kind", PREDICTIONS)
def test_descent_on_the_absolute_error_arrives_at_the_exact_denoiser_of_a_gaussian(kind: Prediction) -> None:
    """Where mean and median agree, and every prediction is a + b x."""
    data, t = gaussian([0.7], [0.5]), 400
    x0, eps, w, x_t = median_grid(data, t)
    ts = torch.full((len(x0),), t)

    def loss(theta: Tensor) -> Tensor:
        return weighted(norm="l1")(lambda x, _: theta[0] + theta[1] * x, kind, x0, ts, eps) @ w

    theta = descend(loss, [0.0, 0.5])
    torch.testing.assert_close(theta[0] + theta[1] * x_t, data.network(SCHEDULE, kind)(x_t, ts), rtol=0, atol=0.01)


def test_the_absolute_error_is_least_at_the_median() -> None:
    """Where nothing is left of x0, the best constant is its mean for least squares and its median for L1."""
    data, schedule = line(), SCHEDULES["zero_snr"]
    n = 2001
    quantiles = ((torch.arange(n, dtype=torch.float64) + 0.5) / n)[:, None]
    x0 = data.transport(torch.special.ndtri(quantiles), (0.0, 1.0))
    candidates = torch.linspace(-1.5, 1.5, 301, dtype=torch.float64)
    t, eps = torch.full((n,), 999), torch.zeros(n, 1, dtype=torch.float64)

    def best(norm: Any) -> float:
        def loss(c: Tensor) -> float:
            network = lambda x, _: c.expand_as(x)  # noqa: E731
            return float(objective.diffusion_loss(network, schedule, x0, t, eps, prediction="x0", norm=norm).mean())

        return float(min(candidates, key=loss))

    assert best("l1") == pytest.approx(float(x0.median()), abs=0.011)
    assert best("l2") == pytest.approx(float(data.mean), abs=0.011)
    assert abs(best("l2") - best("l1")) > 0.1


# --- descent -----------------------------------------------------------------------------------

PAIR = Mixture(double([0.6, 0.4]), double([[-1.0], [0.8]]), double([[[0.16]], [[0.16]]]))


def descend(loss: Callable[[Tensor], Tensor], start: list[float]) -> Tensor:
    theta = torch.tensor(start, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [theta], max_iter=400, tolerance_grad=1e-12, tolerance_change=1e-15, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss(theta)
        value.backward()
        return value

    optimizer.step(closure)
    return theta.detach()


def bent(theta: Tensor, x: Tensor) -> Tensor:
    """a + b x + c tanh(d x + e): what every prediction is for two components of one width."""
    a, c, d = theta[2:].reshape(3, x.shape[1])
    return a + theta[0] * x + c * (x @ d + theta[1]).tanh()[:, None]


def straight(theta: Tensor, x: Tensor) -> Tensor:
    """A x + b: what every prediction is for one Gaussian."""
    return x @ theta[x.shape[1] :].reshape(x.shape[1], x.shape[1]) + theta[: x.shape[1]]


#: Small models that can be exact, where they start from, and their data.
TWO = Mixture(PAIR.weights, double([[-1.0, 0.4], [0.8, -0.2]]), 0.16 * torch.eye(2).double().expand(2, 2, 2))
ONE = Mixture(double([1.0]), space().means[:1], space().covs[:1])
MODELS: dict[int, tuple[Callable[[Tensor, Tensor], Tensor], list[float], Mixture]] = {
    1: (bent, [0.5, 0, 0, 0.5, 1], PAIR),
    2: (bent, [0.5, 0, 0, 0, 0.5, -0.5, 1, -1], TWO),
    64: (straight, [0.0] * (64 + 64**2), ONE),
}


@pytest.mark.parametrize("name", LEAST_SQUARES)
@pytest.mark.parametrize("kind", PREDICTIONS)
@pytest.mark.parametrize("dim", MODELS)
def test_descent_arrives_at_the_exact_denoiser(name: str, kind: Prediction, dim: int) -> None:
    """A small model that can be exact, fitted from elsewhere."""
    (model, start, data), t = MODELS[dim], 400
    x0, eps, w = expectation_grid(data, 40) if dim == 1 else posterior_grid(data, t, 100)
    ts = torch.full((len(x0),), t)
    objective_of = LEAST_SQUARES[name]
    scale = float(objective_of(lambda x, _: 0 * x, kind, x0, ts, eps) @ w)

    def loss(theta: Tensor) -> Tensor:
        return objective_of(lambda x, _: model(theta, x), kind, x0, ts, eps) @ w / scale

    theta = descend(loss, start)
    x = forward.q_sample(SCHEDULE, data.sample(50, generator(3)), ts[:1], randn(50, dim, seed=4))
    exact = data.network(SCHEDULE, kind)(x, torch.full((50,), t))
    torch.testing.assert_close(model(theta, x), exact, rtol=0, atol=2e-3)


def test_hybrid_loss_learns_the_variance_that_is_there() -> None:
    """The mean being exact, one variance for all x_t: beta_tilde + c**2 E Var[x0 | x_t], by the terms' closed form."""
    data, t = line(), 40
    x0, eps, w = GRID
    ts = torch.full((len(x0),), t)
    mean = data.network(SCHEDULE, "eps")

    def denoiser(theta: Tensor) -> Denoiser:
        return Denoiser(lambda x, s: torch.cat([mean(x, s), theta.expand_as(x)], 1), SCHEDULE, "eps", "learned")

    fraction = descend(lambda theta: objective.hybrid_loss(denoiser(theta), x0, ts, eps) @ w, [-0.9])
    bar, before, beta = float(SCHEDULE.alpha_bar[t]), float(SCHEDULE.alpha_bar[t - 1]), float(SCHEDULE.betas[t])
    x_t = forward.q_sample(SCHEDULE, x0, ts, eps)
    mmse = float(data.total_variance(x_t, bar**0.5, (1 - bar) ** 0.5) @ w)
    beta_tilde = beta * (1 - before) / (1 - bar)
    best = beta_tilde + before * (beta / (1 - bar)) ** 2 * mmse
    learned = beta ** ((float(fraction) + 1) / 2) * beta_tilde ** ((1 - float(fraction)) / 2)
    assert learned == pytest.approx(best, rel=1e-6)
    assert beta_tilde < best < beta


def test_hybrid_loss_trains_the_mean_by_least_squares_alone() -> None:
    """The gradient in the first C channels is that of L_simple; in the others, that of L_vlb."""
    x0, eps, t = randn(4, 2, 3, seed=1), randn(4, 2, 3, seed=2), torch.tensor([0, 3, 400, 999])
    output = randn(4, 4, 3, seed=3).requires_grad_()
    denoiser = Denoiser(lambda *_: output, SCHEDULE, "v", "learned")
    (both,) = torch.autograd.grad(objective.hybrid_loss(denoiser, x0, t, eps, vlb_weight=0.5).sum(), output)
    simple = objective.diffusion_loss(lambda *_: output[:, :2], SCHEDULE, x0, t, eps, prediction="v")
    (mean,) = torch.autograd.grad(simple.sum(), output)
    (variance,) = torch.autograd.grad(0.5 * objective.vlb_loss(denoiser, x0, t, eps).sum(), output)
    torch.testing.assert_close(both[:, :2], mean[:, :2])
    torch.testing.assert_close(both[:, 2:], variance[:, 2:])
    assert float(both[:, 2:].abs().min()) > 0
    with pytest.raises(ValueError, match="expected a denoiser of learned variance, got 'beta'"):
        objective.hybrid_loss(Denoiser(lambda x, t: x, SCHEDULE, "v", "beta"), x0, t, eps)


def test_vlb_loss_averages_to_the_bound() -> None:
    """Over all t it is the sum of the terms, in nats per dimension."""
    data, schedule = plane(), NoiseSchedule.linear(30, 1e-3, 0.3)
    t, eps = torch.arange(30), randn(30, 2, seed=2)
    x0 = randn(1, 2, seed=1).expand(30, 2)
    terms = likelihood.vlb_term(data.denoiser(schedule), x0, forward.q_sample(schedule, x0, t, eps), t, t - 1)
    loss = objective.vlb_loss(data.denoiser(schedule), x0, t, eps)
    assert float(loss.mean()) == pytest.approx(float(terms.sum()) / 2)


# --- weights -----------------------------------------------------------------------------------

WEIGHTINGS = {"min_snr": objective.min_snr(), "truncated_snr": objective.truncated_snr(), "p2": objective.p2(0.7, 1.3)}


@pytest.mark.parametrize("name", WEIGHTINGS)
@pytest.mark.parametrize("schedule", [n for n in SCHEDULES if n != "zero_snr"])
def test_a_weighting_is_one_loss_for_every_prediction(name: str, schedule: str) -> None:
    """The same denoiser, said as eps, x0 or v, has the same loss, and it is w times the squared error of x0."""
    data, process, weighting = plane(), SCHEDULES[schedule], WEIGHTINGS[name]
    x0, eps, t = randn(6, 2, seed=1), randn(6, 2, seed=2), torch.tensor([0, 1, 250, 500, 998, 999])
    error = data.denoiser(process).x0(forward.q_sample(process, x0, t, eps), t) - x0
    expected = weighting(process.snr[t]) * error.square().mean(1)
    for kind in PREDICTIONS:
        network = data.network(process, kind)
        loss = objective.diffusion_loss(network, process, x0, t, eps, prediction=kind, weighting=weighting)
        torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-12)


def test_weights_are_those_of_the_papers() -> None:
    snr = torch.tensor([25.0, 1.0, 0.25], dtype=torch.float64)
    bar = snr / (1 + snr)
    schedule, t = NoiseSchedule(1 - bar / torch.cat([torch.ones(1), bar[:-1]])), torch.tensor([0, 1, 2])
    torch.testing.assert_close(schedule.snr[t], snr)

    def weights(kind: Prediction, **options: Any) -> list[float]:
        return objective.loss_weight(schedule, t, kind, **options).tolist()

    for kind in PREDICTIONS:
        assert weights(kind) == [1, 1, 1]
    # Hang et al. 2023, section 3.4: min(snr, 5) on x0, / snr on eps, / (snr + 1) on v.
    assert weights("x0", weighting=objective.min_snr()) == pytest.approx([5, 1, 0.25])
    assert weights("eps", weighting=objective.min_snr()) == pytest.approx([0.2, 1, 1])
    assert weights("v", weighting=objective.min_snr()) == pytest.approx([5 / 26, 0.5, 0.2])
    # Salimans & Ho 2022: max(snr, 1) on x0. Choi et al. 2022: 1 / (k + snr)**gamma on eps.
    assert weights("x0", weighting=objective.truncated_snr()) == pytest.approx([25, 1, 1])
    assert weights("eps", weighting=objective.p2(0.5, 1.0)) == pytest.approx([26**-0.5, 2**-0.5, 1.25**-0.5])


def test_weights_take_their_limit_where_nothing_is_left_of_x0() -> None:
    schedule, t = SCHEDULES["zero_snr"], torch.tensor([999])
    for weighting in (objective.min_snr(), objective.p2()):
        found = [objective.loss_weight(schedule, t, kind, weighting=weighting).item() for kind in PREDICTIONS]
        assert found == pytest.approx([1, 0, 0])  # of eps, x0, v
    assert objective.loss_weight(schedule, t, "v", weighting=objective.truncated_snr()).item() == 1


def test_score_matching_is_the_noise_loss() -> None:
    data, x0, eps = plane(), randn(6, 2, seed=1), randn(6, 2, seed=2)
    t = torch.tensor([0, 1, 250, 500, 998, 999])
    denoiser = data.denoiser(SCHEDULE, "eps")
    torch.testing.assert_close(
        objective.score_matching_loss(denoiser.score, SCHEDULE, x0, t, eps),
        objective.diffusion_loss(denoiser.network, SCHEDULE, x0, t, eps),
    )


# --- shapes ------------------------------------------------------------------------------------


@given(
    kind=st.sampled_from(PREDICTIONS),
    shape=st.lists(st.integers(1, 3), min_size=1, max_size=3),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
    norm=st.sampled_from(["l1", "l2"]),
    t=st.sampled_from([0, 1, 999]),
)
def test_loss_is_the_mean_error_of_each_sample(
    kind: Prediction, shape: list[int], dtype: torch.dtype, norm: Any, t: int
) -> None:
    x0, eps = randn(3, *shape, seed=1).to(dtype), randn(3, *shape, seed=2).to(dtype)
    steps = torch.tensor([t, 500, t])
    loss = objective.diffusion_loss(lambda x, _: 0 * x, SCHEDULE, x0, steps, eps, prediction=kind, norm=norm)
    alpha, sigma = (v.reshape(3, *[1] * len(shape)) for v in (SCHEDULE.alpha[steps], SCHEDULE.sigma[steps]))
    wide0, wide_eps = x0.double(), eps.double()
    answer = {"eps": wide_eps, "x0": wide0, "v": alpha * wide_eps - sigma * wide0}[kind]
    expected = (answer.abs() if norm == "l1" else answer**2).flatten(1).mean(1)
    assert loss.shape == (3,) and loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    slack = 20 * torch.finfo(dtype).eps
    torch.testing.assert_close(loss.double(), expected, rtol=slack, atol=slack)


def test_the_network_sees_x_t_and_t() -> None:
    seen = {}

    def network(x: Tensor, t: Tensor) -> Tensor:
        seen["x"], seen["t"] = x, t
        return x

    x0, eps, t = randn(2, 3, seed=1), randn(2, 3, seed=2), torch.tensor([0, 700])
    objective.diffusion_loss(network, SCHEDULE, x0, t, eps)
    torch.testing.assert_close(seen["x"], forward.q_sample(SCHEDULE, x0, t, eps))
    assert seen["t"].tolist() == [0, 700]
    with pytest.raises(ValueError, match=r"expected the shape of x0, \[2, 3\], got \[2, 6\]"):
        objective.diffusion_loss(lambda x, t: torch.cat([x, x], 1), SCHEDULE, x0, t, eps)
