"""Tables against diffusers' and against the formulas of the papers; timesteps and their ends."""

from __future__ import annotations

import json
import math
from typing import Any

import diffusers
import pytest
import torch
from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr
from hypothesis import given
from hypothesis import strategies as st
from oracles import SCHEDULES

from ldm.diffusion import schedule as schedules
from ldm.diffusion.parameterization import DIFFUSERS_NAMES
from ldm.diffusion.schedule import NoiseSchedule

NAMES = ["linear", "scaled_linear", "cosine", "sigmoid"]
STOCK = [
    diffusers.DDPMScheduler,
    diffusers.DDIMScheduler,
    diffusers.DPMSolverMultistepScheduler,
    diffusers.UniPCMultistepScheduler,
    diffusers.EulerDiscreteScheduler,
    diffusers.HeunDiscreteScheduler,
]


# --- the same process as diffusers' ------------------------------------------------------------


@pytest.mark.parametrize(
    "ours, theirs",
    [
        ("linear", {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}),
        ("scaled_linear", {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}),
        ("cosine", {"beta_schedule": "squaredcos_cap_v2"}),
        ("sigmoid", {"beta_schedule": "sigmoid", "beta_start": 1e-4, "beta_end": 0.02}),
    ],
)
@pytest.mark.parametrize("T", [1000, 50])
@pytest.mark.parametrize("zero", [False, True])
def test_tables_are_those_of_diffusers(ours: str, theirs: dict[str, Any], T: int, zero: bool) -> None:
    """Written out, not by way of `scheduler_config`; to the precision of diffusers' float32."""
    schedule = NoiseSchedule.from_name(ours, T, zero_terminal_snr=zero)
    stock = diffusers.DDPMScheduler(num_train_timesteps=T, rescale_betas_zero_snr=zero, **theirs)
    torch.testing.assert_close(schedule.betas, stock.betas.double(), atol=1e-6, rtol=2e-4)
    torch.testing.assert_close(schedule.alpha_bar, stock.alphas_cumprod.double(), atol=2e-6, rtol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_zero_terminal_snr_is_that_of_diffusers_in_float64(name: str) -> None:
    schedule = NoiseSchedule.from_name(name)
    torch.testing.assert_close(
        schedule.rescale_zero_terminal_snr().betas, rescale_zero_terminal_snr(schedule.betas), atol=1e-12, rtol=0
    )


@pytest.mark.parametrize("stock", STOCK, ids=lambda s: s.__name__)
@pytest.mark.parametrize("name", [*NAMES, "variance_exploding"])
@pytest.mark.parametrize("zero", [False, True])
def test_config_builds_the_same_process(stock: Any, name: str, zero: bool) -> None:
    schedule = NoiseSchedule.from_name(name, 200, zero_terminal_snr=zero)
    for prediction in ("eps", "x0", "v"):
        if prediction == "eps" and zero:
            with pytest.raises(ValueError, match="zero terminal SNR"):
                schedules.scheduler_config(schedule, "eps")
            continue
        config = schedules.scheduler_config(schedule, prediction)
        built = stock.from_config(config)
        if zero and stock is diffusers.HeunDiscreteScheduler and "beta_schedule" in config:
            # It has no such argument. The day it has one, say so in `scheduler_config` and drop this.
            assert float(built.alphas_cumprod[-1]) > float(schedule.alpha_bar[-1])
            continue
        torch.testing.assert_close(built.alphas_cumprod.double(), schedule.alpha_bar, atol=2e-6, rtol=0)
        assert built.config.num_train_timesteps == 200
        assert built.config.prediction_type == DIFFUSERS_NAMES[prediction]
        built.set_timesteps(10)
        assert sorted({int(t) for t in built.timesteps}, reverse=True) == schedule.timesteps(10)


def test_config_is_plain_and_complete() -> None:
    config = schedules.scheduler_config(NoiseSchedule.scaled_linear(), "v")
    assert config == {
        "num_train_timesteps": 1000,
        "prediction_type": "v_prediction",
        "rescale_betas_zero_snr": False,
        "timestep_spacing": "trailing",
        "steps_offset": 0,
        "clip_sample": False,
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "beta_end": 0.012,
    }
    for scheduler in (diffusers.DDPMScheduler, diffusers.DDIMScheduler):
        scheduler(**config)  # knows every argument
    custom = NoiseSchedule(torch.linspace(0.01, 0.3, 7, dtype=torch.float64))
    assert schedules.scheduler_config(custom, "x0")["trained_betas"] == custom.betas.tolist()
    with pytest.raises(ValueError, match="expected eps, x0, v or flow, got 'noise'"):
        schedules.scheduler_config(custom, "noise")  # type: ignore[arg-type]


@pytest.mark.parametrize("name", [*NAMES, "variance_exploding"])
@pytest.mark.parametrize("zero", [False, True])
def test_a_config_gives_the_schedule_back(name: str, zero: bool) -> None:
    schedule = NoiseSchedule.from_name(name, 150, zero_terminal_snr=zero)
    config = json.loads(json.dumps(schedules.noise_config(schedule)))
    found = schedules.schedule_from_config(config)
    torch.testing.assert_close(found.betas, schedule.betas, rtol=1e-12, atol=1e-15)
    assert (found.zero_terminal_snr, found.T) == (zero, 150)


@pytest.mark.parametrize("stock", STOCK, ids=lambda s: s.__name__)
@pytest.mark.parametrize(
    "words",
    [
        {},
        {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "num_train_timesteps": 300},
        {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction"},
        {"trained_betas": [0.1, 0.2, 0.4], "num_train_timesteps": 3, "prediction_type": "sample"},
    ],
)
def test_the_schedule_of_a_stock_scheduler(stock: Any, words: dict[str, Any]) -> None:
    """Against diffusers' own tables, whoever chose the numbers."""
    scheduler = stock(**words)
    found = schedules.schedule_from_config(scheduler.config)
    torch.testing.assert_close(found.alpha_bar, scheduler.alphas_cumprod.double(), atol=2e-6, rtol=1e-4)
    ours = schedules.prediction_from_config(scheduler.config)
    assert DIFFUSERS_NAMES[ours] == words.get("prediction_type", "epsilon")


def test_another_process_is_refused() -> None:
    for scheduler in (diffusers.FlowMatchEulerDiscreteScheduler(), diffusers.EDMEulerScheduler()):
        with pytest.raises(ValueError, match="got None; is it another process"):
            schedules.schedule_from_config(scheduler.config)
    for words in ({"prediction_type": "flow_prediction"}, {"use_flow_sigmas": True}):
        mixed = diffusers.DPMSolverMultistepScheduler(**words)
        with pytest.raises(ValueError, match="prediction_type: flow_prediction and use_flow_sigmas go together"):
            schedules.prediction_from_config(mixed.config)


# --- the formulas ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCHEDULES)
def test_tables_follow_from_the_betas(name: str) -> None:
    """alpha_bar by a Python loop over eq. 4; alpha and sigma on the unit circle; noisier with t."""
    schedule = SCHEDULES[name]
    product = 1.0
    for t, beta in enumerate(schedule.betas.tolist()):
        product *= 1 - beta
        assert float(schedule.alpha[t]) == pytest.approx(math.sqrt(product), rel=1e-10, abs=1e-15)
    torch.testing.assert_close(schedule.alpha**2 + schedule.sigma**2, torch.ones_like(schedule.alpha))
    torch.testing.assert_close(schedule.snr, (schedule.alpha / schedule.sigma) ** 2)
    assert bool((schedule.snr.diff() < 0).all())


def test_published_constants() -> None:
    linear, scaled = NoiseSchedule.linear(), NoiseSchedule.scaled_linear()
    assert (float(linear.betas[0]), float(linear.betas[-1])) == pytest.approx((1e-4, 0.02))
    assert (float(scaled.betas[0]), float(scaled.betas[-1])) == pytest.approx((0.00085, 0.012))
    assert float(scaled.betas[500].sqrt()) == pytest.approx(0.00085**0.5 + 500 / 999 * (0.012**0.5 - 0.00085**0.5))
    assert float(linear.alpha_bar[-1]) == pytest.approx(4.036e-5, rel=1e-3)  # Ho et al. 2020: L_T about 1e-5 bits/dim
    cosine = NoiseSchedule.cosine()
    for t in (0, 499, 900):  # eq. 17, before the cap
        f = math.cos(((t + 1) / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 / math.cos(0.008 / 1.008 * math.pi / 2) ** 2
        assert float(cosine.alpha_bar[t]) == pytest.approx(f, rel=1e-9)
    assert float(cosine.betas.max()) == 0.999
    exploding = SCHEDULES["variance_exploding"]
    s = exploding.sigma / exploding.alpha
    assert (float(s[0]), float(s[-1])) == pytest.approx((0.01, 50.0))
    torch.testing.assert_close(s[1:] / s[:-1], (s[1] / s[0]).expand(999))


@pytest.mark.parametrize("name", NAMES)
def test_zero_terminal_snr_keeps_the_first_and_ends_in_noise(name: str) -> None:
    schedule, rescaled = NoiseSchedule.from_name(name), NoiseSchedule.from_name(name, zero_terminal_snr=True)
    assert float(rescaled.alpha[-1]) == 0.0 and float(rescaled.snr[-1]) == 0.0
    assert float(rescaled.alpha[0]) == pytest.approx(float(schedule.alpha[0]), abs=1e-12)
    assert rescaled.name == name and rescaled.zero_terminal_snr


# --- timesteps and their ends ------------------------------------------------------------------


@given(
    T=st.integers(2, 60),
    shape=st.lists(st.integers(1, 3), max_size=3),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
    data=st.data(),
)
def test_gather_takes_any_shape_and_dtype(T: int, shape: list[int], dtype: torch.dtype, data: st.DataObject) -> None:
    t = torch.tensor([0, T - 1, data.draw(st.integers(0, T - 1))])
    like = torch.zeros(3, *shape, dtype=dtype)
    alpha, sigma = NoiseSchedule.linear(T).at(t, like)
    assert alpha.shape == sigma.shape == (3, *[1] * len(shape))
    assert alpha.dtype == sigma.dtype == dtype
    assert (alpha * like).shape == like.shape
    torch.testing.assert_close(alpha.flatten(), NoiseSchedule.linear(T).alpha[t].to(dtype), rtol=0, atol=0)


@given(T=st.integers(1, 40), t=st.integers(-50, 80).filter(lambda t: t != 0))
def test_gather_refuses_t_out_of_range(T: int, t: int) -> None:
    table = torch.arange(T, dtype=torch.float64)
    if 0 <= t < T:
        assert schedules.gather(table, torch.tensor([t]), table).item() == t
    else:
        with pytest.raises(IndexError, match=rf"expected values in \[0, {T}\)"):
            schedules.gather(table, torch.tensor([0, t]), table)


@given(T=st.integers(1, 1200), data=st.data())
def test_timesteps_start_at_the_end(T: int, data: st.DataObject) -> None:
    schedule = NoiseSchedule.linear(T)
    n = data.draw(st.integers(1, T))
    steps = schedule.timesteps(n)
    assert len(steps) == n and steps[0] == T - 1 and steps[-1] >= 0
    assert all(a > b for a, b in zip(steps, steps[1:], strict=False))
    assert schedule.timesteps() == list(range(T - 1, -1, -1))
    for wrong in (0, T + 1):
        with pytest.raises(ValueError, match="timesteps: expected 1 to"):
            schedule.timesteps(wrong)


def test_errors_name_what_came() -> None:
    with pytest.raises(ValueError, match="expected one of linear, scaled_linear, .*got 'quadratic'"):
        NoiseSchedule.from_name("quadratic")
    with pytest.raises(ValueError, match=r"expected float64 of shape \[T\], got torch.float32 \[3\]"):
        NoiseSchedule(torch.ones(3) / 2)
    for bad in (0.0, -0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match=r"every beta must lie in \(0, 1\]"):
            NoiseSchedule(torch.tensor([0.1, bad], dtype=torch.float64))
