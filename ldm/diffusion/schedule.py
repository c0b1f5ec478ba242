"""How much signal and how much noise there is at each timestep.

A schedule is T numbers beta_t, the variance that step t adds (Ho et al. 2020, eq. 2):

    q(x_t | x_{t-1}) = N(sqrt(1 - beta_t) x_{t-1}, beta_t I)

A step multiplies what it finds by sqrt(1 - beta_t) and adds independent noise, so the factors of x0
multiply and the variances follow v_t = (1 - beta_t) v_{t-1} + beta_t, that is, 1 - v_t = (1 - beta_t)(1 - v_{t-1}).
All the steps up to t therefore collapse into one, the marginal that training uses (eq. 4):

    q(x_t | x0) = N(alpha_t x0, sigma_t**2 I),   alpha_t**2 = prod_{s<=t} (1 - beta_s),   sigma_t**2 = 1 - alpha_t**2

`RectifiedFlow` is a straight path from data to noise instead, alpha = 1 - sigma, and has the same tables.

Tables are float64 and on the CPU: products of a thousand factors near one lose half their digits
in float32. They are cast and moved when they meet a tensor, in `gather`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ldm.diffusion.parameterization import DIFFUSERS_NAMES, Prediction


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """The noise schedule of a variance-preserving diffusion with T discrete timesteps.

    Attributes:
        betas: float64 [T], each in (0, 1]; the variance added by step t.
        name: "linear", "scaled_linear", "cosine", "sigmoid", or "custom" where the betas say it all.
        beta_start, beta_end: the constants of the named schedules that have them.
        zero_terminal_snr: whether `rescale_zero_terminal_snr` made the betas from those of the name.
    Raises:
        ValueError: for betas of another type or shape, or outside (0, 1].
    """

    betas: Tensor
    name: str = "custom"
    beta_start: float | None = None
    beta_end: float | None = None
    zero_terminal_snr: bool = False

    def __post_init__(self) -> None:
        if self.betas.ndim != 1 or self.betas.dtype != torch.float64:
            raise ValueError(f"betas: expected float64 of shape [T], got {self.betas.dtype} {list(self.betas.shape)}")
        if not bool(((self.betas > 0) & (self.betas <= 1)).all()):
            raise ValueError("betas: every beta must lie in (0, 1]")

    # --- the named schedules -------------------------------------------------------------------

    @classmethod
    def linear(cls, T: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> NoiseSchedule:
        """beta_t linear in t (Ho et al. 2020, section 4)."""
        betas = torch.linspace(beta_start, beta_end, T, dtype=torch.float64)
        return cls(betas, "linear", beta_start, beta_end)

    @classmethod
    def scaled_linear(cls, T: int = 1000, beta_start: float = 0.00085, beta_end: float = 0.012) -> NoiseSchedule:
        """sqrt(beta_t) linear in t (Rombach et al. 2022, the schedule of latent diffusion)."""
        betas = torch.linspace(beta_start**0.5, beta_end**0.5, T, dtype=torch.float64) ** 2
        return cls(betas, "scaled_linear", beta_start, beta_end)

    @classmethod
    def sigmoid(cls, T: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> NoiseSchedule:
        """beta_t on a logistic curve from -6 to 6 (Xu et al. 2022, GeoDiff; diffusers' "sigmoid")."""
        u = torch.linspace(-6, 6, T, dtype=torch.float64).sigmoid()
        return cls(beta_start + (beta_end - beta_start) * u, "sigmoid", beta_start, beta_end)

    @classmethod
    def cosine(cls, T: int = 1000) -> NoiseSchedule:
        """alpha_t**2 = f(t) / f(0), f(t) = cos((t/T + s)/(1 + s) pi/2)**2, beta <= 0.999 (Nichol & Dhariwal 2021)."""
        s, max_beta = 0.008, 0.999
        u = torch.linspace(0, 1, T + 1, dtype=torch.float64)
        f = torch.cos((u + s) / (1 + s) * math.pi / 2) ** 2  # eq. 17
        return cls((1 - f[1:] / f[:-1]).clamp(max=max_beta), "cosine")

    @classmethod
    def variance_exploding(cls, T: int = 1000, sigma_min: float = 0.01, sigma_max: float = 50.0) -> NoiseSchedule:
        """Geometric sigma/alpha, the noise levels of Song et al. 2021, "VE".

        A variance-exploding process y = x0 + s eps is a variance-preserving one seen through x = y / sqrt(1 + s**2):
        alpha = 1 / sqrt(1 + s**2), sigma = s / sqrt(1 + s**2). So this is all it takes to have it.
        """
        s = torch.logspace(math.log10(sigma_min), math.log10(sigma_max), T, dtype=torch.float64)
        alpha_bar = 1 / (1 + s**2)
        return cls(_betas_from_alpha_bar(alpha_bar))

    @classmethod
    def from_name(cls, name: str, T: int = 1000, *, zero_terminal_snr: bool = False) -> NoiseSchedule:
        """The schedule called `name` at its published constants.

        Args:
            name: "linear", "scaled_linear", "cosine", "sigmoid", "variance_exploding" or "rectified_flow".
            zero_terminal_snr: as `rescale_zero_terminal_snr`.
        Raises:
            ValueError: for another name, or rectified flow with zero terminal SNR.
        """
        makers: dict[str, Callable[[int], NoiseSchedule]] = {
            "linear": cls.linear,
            "scaled_linear": cls.scaled_linear,
            "cosine": cls.cosine,
            "sigmoid": cls.sigmoid,
            "variance_exploding": cls.variance_exploding,
            "rectified_flow": RectifiedFlow.straight,
        }
        if name not in makers:
            raise ValueError(f"schedule: expected one of {', '.join(makers)}, got {name!r}")
        schedule = makers[name](T)
        return schedule.rescale_zero_terminal_snr() if zero_terminal_snr else schedule

    def rescale_zero_terminal_snr(self) -> NoiseSchedule:
        """The same schedule shifted and scaled so that the last timestep holds no signal (Lin et al. 2024, alg. 1)."""
        root = self.alpha
        root = (root - root[-1]) * root[0] / (root[0] - root[-1])  # alpha: first kept, last => 0
        return replace(self, betas=_betas_from_alpha_bar(root**2), zero_terminal_snr=True)

    # --- the tables ----------------------------------------------------------------------------

    @property
    def T(self) -> int:
        """Number of timesteps."""
        return len(self.betas)

    @cached_property
    def alpha_bar(self) -> Tensor:
        """float64 [T]: alpha_t**2, the `alphas_cumprod` of diffusers and alpha-bar of Ho et al. 2020."""
        return (1 - self.betas).cumprod(0)

    @cached_property
    def alpha(self) -> Tensor:
        """float64 [T]: the factor of x0 in x_t."""
        return self.alpha_bar.sqrt()

    @cached_property
    def sigma(self) -> Tensor:
        """float64 [T]: the standard deviation of the noise in x_t."""
        return self.sigma2.sqrt()

    @cached_property
    def sigma2(self) -> Tensor:
        """float64 [T]: sigma_t**2."""
        return 1 - self.alpha_bar

    @cached_property
    def snr(self) -> Tensor:
        """float64 [T]: alpha_t**2 / sigma_t**2, the signal-to-noise ratio (Kingma et al. 2021)."""
        return self.alpha_bar / self.sigma2

    def timesteps(self, n: int | None = None) -> list[int]:
        """n timesteps, descending from T - 1, evenly spaced (Lin et al. 2024, table 2, "trailing"); all T by default.

        Raises:
            ValueError: for n outside [1, T].
        """
        n = self.T if n is None else n
        if not 1 <= n <= self.T:
            raise ValueError(f"timesteps: expected 1 to {self.T} of them, got {n}")
        return [round(self.T - i * self.T / n) - 1 for i in range(n)]

    def at(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """alpha_t and sigma_t for a batch.

        Args:
            t: int64 [B] in [0, T).
            like: a tensor [B, ...] whose dtype, device and number of dimensions the answer takes.
        Returns:
            alpha_t, sigma_t: each [B, 1, ..., 1].
        """
        return gather(self.alpha, t, like), gather(self.sigma, t, like)


@dataclass(frozen=True, eq=False)
class RectifiedFlow(NoiseSchedule):
    """The straight path x_t = (1 - s) x0 + s eps (Liu et al. 2023; Lipman et al. 2023), s = (t + 1/2) / T.

    Stock samplers step through any s and give the network t = floor(s T): what it has learned there is the middle of
    the interval. Up to the factor sqrt(alpha**2 + sigma**2) the path is the variance-preserving process of the same
    SNR, which the betas are of.

    Attributes:
        shift: moves noise levels towards noise, s => shift s / (1 + (shift - 1) s), where the sampler steps and where
            training looks (Esser et al. 2024, eq. 23); the path itself is the same.
    """

    shift: float = 1.0

    @classmethod
    def straight(cls, T: int = 1000, shift: float = 1.0) -> RectifiedFlow:
        """The path in T timesteps."""
        s = (torch.arange(T, dtype=torch.float64) + 0.5) / T
        alpha_bar = (1 - s) ** 2 / ((1 - s) ** 2 + s**2)
        return cls(_betas_from_alpha_bar(alpha_bar), "rectified_flow", shift=shift)

    @cached_property
    def alpha_bar(self) -> Tensor:
        return (1 - self.sigma) ** 2

    @cached_property
    def alpha(self) -> Tensor:
        return 1 - self.sigma

    @cached_property
    def sigma2(self) -> Tensor:
        return self.sigma**2

    @cached_property
    def sigma(self) -> Tensor:
        return (torch.arange(self.T, dtype=torch.float64) + 0.5) / self.T

    def rescale_zero_terminal_snr(self) -> NoiseSchedule:
        """Refused: the path ends in noise as it is. Raises ValueError."""
        raise ValueError("zero_terminal_snr: rectified_flow ends in noise without it; set it to false")


def _betas_from_alpha_bar(alpha_bar: Tensor) -> Tensor:
    return 1 - torch.cat([alpha_bar[:1], alpha_bar[1:] / alpha_bar[:-1]])


def gather(table: Tensor, t: Tensor, like: Tensor) -> Tensor:
    """table[t], in the dtype and on the device of `like`, shaped [B, 1, ..., 1] to multiply it.

    The table is on the CPU: a `t` that is on the CPU as well costs a GPU no synchronization.

    Raises:
        IndexError: if any t lies outside [0, T); negative t would silently count from the noisy end.
    """
    t = t.cpu()
    if t.numel() and (int(t.min()) < 0 or int(t.max()) >= len(table)):
        raise IndexError(f"t: expected values in [0, {len(table)}), got {int(t.min())} to {int(t.max())}")
    return beside(table[t], like).reshape(-1, *[1] * (like.ndim - 1))


def beside(values: Tensor, like: Tensor) -> Tensor:
    """Values of the CPU in the dtype and on the device of `like`, without waiting for a GPU.

    A plain `.to` waits until all that the GPU has been told is done. CUDA copies what is in pageable memory before it
    returns, so nothing can change them on the way.
    """
    return values.to(device=like.device, dtype=like.dtype, non_blocking=like.is_cuda)


def scheduler_config(schedule: NoiseSchedule, prediction: Prediction) -> dict[str, Any]:
    """The arguments that make a stock diffusers scheduler walk this very process.

    `DDPMScheduler(**config)` and `DDIMScheduler(**config)` know every argument; the other samplers take what they
    know of it from `Sampler.from_config(config)`. HeunDiscreteScheduler knows no `rescale_betas_zero_snr` and
    ignores it in silence: don't give it a zero-terminal-SNR schedule. "sigmoid" is a name that DDPMScheduler alone
    knows, so it travels as `trained_betas`, like every schedule without a name there.

    Raises:
        ValueError: for noise prediction with zero terminal SNR: where x_t is all noise, it does not determine x0; for
            a flow on another path than rectified flow's, or another prediction there.
    """
    if prediction not in DIFFUSERS_NAMES:
        raise ValueError(f"prediction: expected eps, x0, v or flow, got {prediction!r}")
    if (prediction == "flow") != isinstance(schedule, RectifiedFlow):
        raise ValueError(f"prediction: rectified_flow and flow belong together, got {schedule.name} and {prediction}")
    if prediction == "eps" and schedule.zero_terminal_snr:
        raise ValueError("prediction: eps leaves x0 open at zero terminal SNR; expected x0 or v")
    return {
        **noise_config(schedule),
        "prediction_type": DIFFUSERS_NAMES[prediction],
        "timestep_spacing": "trailing",  # starts at T - 1, where training ended (Lin et al. 2024, section 3.3)
        "steps_offset": 0,
        "clip_sample": False,
    }


def noise_config(schedule: NoiseSchedule) -> dict[str, Any]:
    """The process alone, in the words of diffusers' schedulers; `schedule_from_config` is its inverse."""
    if isinstance(schedule, RectifiedFlow):
        return {"num_train_timesteps": schedule.T, "use_flow_sigmas": True, "flow_shift": schedule.shift}
    config: dict[str, Any] = {"num_train_timesteps": schedule.T, "rescale_betas_zero_snr": schedule.zero_terminal_snr}
    if schedule.name in ("linear", "scaled_linear"):
        config |= {"beta_schedule": schedule.name, "beta_start": schedule.beta_start, "beta_end": schedule.beta_end}
    elif schedule.name == "cosine":
        config |= {"beta_schedule": "squaredcos_cap_v2"}
    else:
        config |= {"trained_betas": schedule.betas.tolist()}
    return config


def schedule_from_config(config: Mapping[str, Any]) -> NoiseSchedule:
    """The process that a stock diffusers scheduler of this config walks, in float64.

    Args:
        config: a scheduler's `config`, or what `noise_config` or `scheduler_config` made.
    Raises:
        ValueError: if it is no process x_t = alpha x0 + sigma eps of those known here.
    """
    if config.get("use_flow_sigmas"):
        return RectifiedFlow.straight(config["num_train_timesteps"], config.get("flow_shift") or 1.0)
    betas, name = config.get("trained_betas"), config.get("beta_schedule")
    if betas is not None:
        schedule = NoiseSchedule(torch.tensor(betas, dtype=torch.float64))
    elif name == "squaredcos_cap_v2":
        schedule = NoiseSchedule.cosine(config["num_train_timesteps"])
    elif name in ("linear", "scaled_linear", "sigmoid"):
        make = getattr(NoiseSchedule, name)
        schedule = make(config["num_train_timesteps"], config["beta_start"], config["beta_end"])
    else:
        raise ValueError(
            f"beta_schedule: expected linear, scaled_linear, squaredcos_cap_v2 or sigmoid, got {name!r}; "
            "is it another process than x_t = alpha x0 + sigma eps?"
        )
    return schedule.rescale_zero_terminal_snr() if config.get("rescale_betas_zero_snr") else schedule


def prediction_from_config(config: Mapping[str, Any]) -> Prediction:
    """What a network predicts, by its scheduler's config. Raises ValueError if it is none of ours."""
    theirs = config.get("prediction_type", "epsilon")
    ours: dict[str, Prediction] = {name: prediction for prediction, name in DIFFUSERS_NAMES.items()}
    if theirs not in ours:
        raise ValueError(f"prediction_type: expected one of {', '.join(ours)}, got {theirs!r}")
    if (theirs == "flow_prediction") != bool(config.get("use_flow_sigmas")):
        raise ValueError(f"prediction_type: flow_prediction and use_flow_sigmas go together, got {theirs!r}")
    return ours[theirs]
