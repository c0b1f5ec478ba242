"""Samplers by name: stock diffusers schedulers, and two of our own mathematics in the same form.

    build("ddim", pipeline.scheduler.config)     a scheduler for the process that the model was trained on

`pc` and `ode` evaluate the network twice a step, as `heun` does: their `timesteps` list both evaluations.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from ldm.diffusion.forward import q_sample
from ldm.diffusion.reverse import Denoiser, ancestral_step
from ldm.diffusion.samplers import angle, heun_step, langevin_step
from ldm.diffusion.schedule import prediction_from_config, schedule_from_config
from ldm.inference.defaults import check_sampler

#: name => the stock class, and what its config needs besides the model's.
STOCK: dict[str, tuple[str, dict[str, Any]]] = {
    "ddpm": ("DDPMScheduler", {}),
    "ddim": ("DDIMScheduler", {}),
    "dpm++": ("DPMSolverMultistepScheduler", {}),
    "dpm++sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "unipc": ("UniPCMultistepScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler-a": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "lms": ("LMSDiscreteScheduler", {}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),
    "deis": ("DEISMultistepScheduler", {}),
    "lcm": ("LCMScheduler", {}),
}
#: Samplers whose stock scheduler has dynamic thresholding.
THRESHOLDING = ("ddpm", "ddim", "dpm++", "dpm++sde", "unipc", "deis")
#: Stock schedulers that ignore `rescale_betas_zero_snr`, and would leave the trained process without a word.
NO_ZERO_SNR = ("heun", "lms", "pndm", "deis")
#: What can walk a straight path.
FLOW = ("dpm++", "dpm++sde", "unipc", "deis")


def build(name: str, config: Mapping[str, Any]) -> Any:
    """A scheduler of this name for the process in another scheduler's config.

    Raises:
        ValueError: for an unknown name; for a process that this sampler doesn't know.
        ModuleNotFoundError: for `lms` without SciPy.
    """
    check_sampler("sampler", name)
    if name in NO_ZERO_SNR and config.get("rescale_betas_zero_snr"):
        raise ValueError(f"sampler: {name} knows no zero terminal SNR; use ddim, dpm++, euler or unipc")
    if name not in FLOW and config.get("use_flow_sigmas"):
        raise ValueError(f"sampler: {name} does not support rectified flow; use {', '.join(FLOW[:-1])} or {FLOW[-1]}")
    if name in OURS:
        return OURS[name](config)
    import diffusers

    kind, more = STOCK[name]
    if name == "lms" and not diffusers.utils.is_scipy_available():
        raise ModuleNotFoundError("sampler: lms needs SciPy; pip install scipy", name="scipy")
    return getattr(diffusers, kind).from_config({**config, **more})


def thresholding(scheduler: Any, quantile: Any) -> Any:
    """A scheduler of the same class and process with dynamic thresholding (Saharia et al. 2022, section 2.3).

    At each step x0 is clamped to s, the quantile of its absolute values, and divided by s, if s is above 1.

    Raises:
        ValueError: for a quantile outside (0, 1], or a scheduler that has no such setting.
    """
    if not isinstance(quantile, int | float) or isinstance(quantile, bool) or not 0 < quantile <= 1:
        raise ValueError(f"dynamic_thresholding: expected a quantile above 0, up to 1, such as 0.995, got {quantile!r}")
    kind = type(scheduler)
    config = scheduler.config
    if "thresholding" not in inspect.signature(kind.__init__).parameters or config.get("algorithm_type") == "dpmsolver":
        raise ValueError(
            f"dynamic_thresholding: {kind.__name__} has none; use one of the samplers {', '.join(THRESHOLDING)}"
        )
    on = {"thresholding": True, "dynamic_thresholding_ratio": float(quantile), "sample_max_value": math.inf}
    return kind.from_config({**config, **on})


class _TwoEvaluations:
    """What the two samplers below share: the interface of a stock scheduler, over timesteps that come twice.

    For levels l_0 > l_1 > ... the network is evaluated at l_0, l_1, l_1, l_2, l_2, ...: once to arrive at a level,
    once to leave it.
    """

    init_noise_sigma = 1.0
    order = 2

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = config
        self.schedule = schedule_from_config(config)
        self.prediction = prediction_from_config(config)
        self.timesteps = torch.zeros(0, dtype=torch.int64)
        self.levels: list[int] = []
        self._done = 0

    @property
    def alphas_cumprod(self) -> Tensor:
        """alpha_t**2, float32 [T], as stock schedulers have it."""
        return self.schedule.alpha_bar.float()

    def set_timesteps(self, num_inference_steps: int, device: torch.device | str | None = None) -> None:
        """So many levels, from the noisiest, evenly spaced."""
        self.levels = self.schedule.timesteps(num_inference_steps)
        twice = [level for level in self.levels for _ in range(2)][1:]
        self.timesteps = torch.tensor(twice, device=device)
        self._done = 0

    def set_begin_index(self, begin_index: int) -> None:
        """Start at this one of the timesteps, an even one: at a level that is left."""
        self._done = begin_index

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Clean samples [B,C,h,w] => alpha_t x0 + sigma_t eps, at timesteps [B] or [1]."""
        return q_sample(self.schedule, original_samples, timesteps.to(original_samples.device), noise)

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """The sample itself: it is alpha_t x0 + sigma_t eps."""
        return sample

    def _denoiser(self, output: Tensor) -> Denoiser:
        """The network, as far as it is known: its output at the present sample."""
        return Denoiser(lambda x_t, t: output, self.schedule, self.prediction)

    def _place(self) -> tuple[int, bool]:
        """The level of this evaluation, and whether it arrives there; counts on."""
        evaluation, self._done = self._done, self._done + 1
        return (evaluation + 1) // 2, evaluation % 2 == 1


class PredictorCorrector(_TwoEvaluations):
    """Ancestral steps, each followed by a step of Langevin dynamics at its level (Song et al. 2021, alg. 1)."""

    def step(
        self, model_output: Tensor, timestep: Any, sample: Tensor, generator: Any = None, return_dict: bool = False
    ) -> tuple[Tensor]:
        """x_t [B,C,h,w] and the network's output there => the next sample."""
        number, corrects = self._place()
        t = torch.full((len(sample),), self.levels[number], device=sample.device)
        noise = randn_tensor(sample.shape, generator=generator, device=sample.device, dtype=sample.dtype)
        denoiser = self._denoiser(model_output)
        if corrects:
            return (langevin_step(denoiser, sample, t, noise),)
        following = self.levels[number + 1] if number + 1 < len(self.levels) else -1
        return (ancestral_step(denoiser, sample, t, torch.full_like(t, following), noise),)


class ProbabilityFlow(_TwoEvaluations):
    """The ODE with the same marginals, dx/dphi = v, by Heun's method; no noise (Song et al. 2021, eq. 13)."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__(config)
        self._left: tuple[Tensor, Tensor] | None = None  # the sample at the level that was left, and v there

    def step(self, model_output: Tensor, timestep: Any, sample: Tensor, return_dict: bool = False) -> tuple[Tensor]:
        """x_t [B,C,h,w] and the network's output there => the next sample."""
        number, arrives = self._place()
        t = torch.full((len(sample),), self.levels[number], device=sample.device)
        denoiser = self._denoiser(model_output)
        if arrives:  # with the slopes at both ends
            assert self._left is not None
            start, slope = self._left
            width = self._width(number - 1)
            return (heun_step(start, slope, denoiser.v(sample, t), width),)
        if number + 1 == len(self.levels):
            return (denoiser.x0(sample, t),)
        slope = denoiser.v(sample, t)
        self._left = (sample, slope)
        return (sample + self._width(number) * slope,)

    def _width(self, number: int) -> float:
        """From a level to the next, in phi."""
        return angle(self.schedule, self.levels[number + 1]) - angle(self.schedule, self.levels[number])


OURS: dict[str, type[_TwoEvaluations]] = {"pc": PredictorCorrector, "ode": ProbabilityFlow}
