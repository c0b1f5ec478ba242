"""The config's `diffusion` section => the process, which t it is learned at, and what is minimized there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from ldm.diffusion import losses as objective
from ldm.diffusion import timesteps
from ldm.diffusion.losses import Network
from ldm.diffusion.parameterization import Prediction
from ldm.diffusion.reverse import Denoiser
from ldm.diffusion.schedule import NoiseSchedule, RectifiedFlow
from ldm.system.checks import check

#: (network, x0, t, eps) => the loss of each sample [B].
Objective = Callable[[Network, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class DiffusionConfig:
    """The process and the objective; the defaults are the epsilon-loss of DDPM.

    Attributes:
        schedule: linear (Ho et al. 2020), scaled_linear (Rombach et al. 2022), cosine (Nichol & Dhariwal 2021),
            sigmoid (Xu et al. 2022), or rectified_flow, a straight path (Liu et al. 2023).
        flow_shift: of rectified_flow: above 1 moves training and sampling towards noise, as large pictures need
            (Esser et al. 2024, eq. 23).
        timesteps: T.
        zero_terminal_snr: rescale the schedule so that its last step holds no signal; not with eps (Lin et al. 2024).
        prediction: what the U-Net predicts; of rectified_flow it is flow, eps - x0.
        loss: its squared error (l2), its absolute error (l1), or the bound on the likelihood (vlb).
        weighting: of the squared error: none for L_simple, min_snr (Hang et al. 2023), truncated_snr (Salimans & Ho
            2022) or p2 (Choi et al. 2022).
        min_snr_gamma: where min_snr cuts.
        p2_gamma, p2_k: exponent and offset of p2.
        variance: of the reverse steps: fixed, or learned beside the mean (Nichol & Dhariwal 2021). Pipelines are
            saved without the channels that learn it: no stock pipeline knows them.
        vlb_weight: of the bound in the hybrid loss, which l2 becomes when the variance is learned.
        timestep_sampling: which t a step learns at: uniform, logit_normal (Esser et al. 2024), or by the
            loss_second_moment (Nichol & Dhariwal 2021), which is for vlb.
        few_steps: learn at the timesteps of a sampler of so many steps alone, a power of two to serve its halves as
            well; the pipeline then takes so many, unguided. 0 is every timestep.
        caption_dropout: share of captions replaced by "", and of class labels by the null class with them, for
            classifier-free guidance (Ho & Salimans 2022).
    """

    schedule: Literal["linear", "scaled_linear", "cosine", "sigmoid", "rectified_flow"] = "scaled_linear"
    timesteps: int = 1000
    flow_shift: float = 1.0
    zero_terminal_snr: bool = False
    prediction: Prediction = "eps"
    loss: Literal["l2", "l1", "vlb"] = "l2"
    weighting: Literal["none", "min_snr", "truncated_snr", "p2"] = "none"
    min_snr_gamma: float = 5.0
    p2_gamma: float = 1.0
    p2_k: float = 1.0
    variance: Literal["fixed", "learned"] = "fixed"
    vlb_weight: float = 0.001
    timestep_sampling: Literal["uniform", "logit_normal", "loss_second_moment"] = "uniform"
    few_steps: int = 0
    caption_dropout: float = 0.1

    def __post_init__(self) -> None:
        check("diffusion.timesteps", self.timesteps, at_least=1)
        check("diffusion.few_steps", self.few_steps, at_least=0, at_most=self.timesteps)
        check("diffusion.caption_dropout", self.caption_dropout, at_least=0, at_most=1)
        for name in ("min_snr_gamma", "p2_k", "vlb_weight"):
            check(f"diffusion.{name}", getattr(self, name), above=0)
        check("diffusion.p2_gamma", self.p2_gamma, at_least=0)
        if self.zero_terminal_snr and self.prediction == "eps":
            raise ValueError(
                "diffusion.prediction: eps determines no x0 where there is no signal; "
                "with zero_terminal_snr use v or x0"
            )
        if self.weighting != "none" and self.loss != "l2":
            raise ValueError(f"diffusion.weighting: {self.weighting} weighs the squared error; with it use loss=l2")
        if self.variance == "learned" and self.loss == "l1":
            raise ValueError("diffusion.loss: l1 does not train the variance; to learn it use l2 or vlb")
        if self.few_steps and (self.loss == "vlb" or self.variance == "learned"):
            raise ValueError("diffusion.few_steps: the bound is a sum over every timestep; use loss=l2, variance=fixed")
        if self.few_steps and self.timestep_sampling != "uniform":
            raise ValueError("diffusion.few_steps: names the timesteps; leave diffusion.timestep_sampling out")
        if self.few_steps and self.schedule == "rectified_flow":
            raise ValueError("diffusion.few_steps: takes the timesteps of a schedule of betas; rectified_flow has none")
        check("diffusion.flow_shift", self.flow_shift, above=0)
        if self.schedule == "rectified_flow":
            self.check_flow()
        elif self.prediction == "flow":
            raise ValueError(
                "diffusion.prediction: flow is along a straight path; set diffusion.schedule=rectified_flow"
            )
        elif self.flow_shift != 1:
            raise ValueError("diffusion.flow_shift: it is rectified_flow's; set diffusion.schedule=rectified_flow")

    def check_flow(self) -> None:
        """Refuse what has no meaning, or no stock sampler, on a straight path."""
        allowed: dict[str, tuple[object, ...]] = {
            "prediction": ("flow",),
            "zero_terminal_snr": (False,),
            "loss": ("l2", "l1"),
            "variance": ("fixed",),
            "timestep_sampling": ("uniform", "logit_normal"),
        }
        for name, values in allowed.items():
            if getattr(self, name) not in values:
                expected = " or ".join(str(value).lower() for value in values)
                raise ValueError(f"diffusion.{name}: rectified_flow needs {expected}, got {getattr(self, name)}")


def build_schedule(config: DiffusionConfig) -> NoiseSchedule:
    """The process."""
    if config.schedule == "rectified_flow":
        return RectifiedFlow.straight(config.timesteps, config.flow_shift)
    return NoiseSchedule.from_name(config.schedule, config.timesteps, zero_terminal_snr=config.zero_terminal_snr)


def build_timesteps(config: DiffusionConfig, schedule: NoiseSchedule) -> timesteps.TimestepSampler:
    """How t is sampled. LossSecondMoment has a memory, which belongs into checkpoints."""
    if config.few_steps:
        return timesteps.among(schedule.timesteps(config.few_steps))
    if config.timestep_sampling == "loss_second_moment":
        return timesteps.LossSecondMoment(config.timesteps)
    makers = {"uniform": timesteps.uniform, "logit_normal": timesteps.logit_normal}
    sampler = makers[config.timestep_sampling](config.timesteps)
    return timesteps.shifted(sampler, config.timesteps, config.flow_shift)


def build_weighting(config: DiffusionConfig) -> objective.Weighting | None:
    """The weight of the squared error of x0; None is L_simple."""
    if config.weighting == "min_snr":
        return objective.min_snr(config.min_snr_gamma)
    if config.weighting == "p2":
        return objective.p2(config.p2_gamma, config.p2_k)
    return objective.truncated_snr() if config.weighting == "truncated_snr" else None


def build_objective(config: DiffusionConfig, schedule: NoiseSchedule) -> Objective:
    """What is minimized, a function of the network and of a noised batch."""
    weighting = build_weighting(config)
    learned = config.variance == "learned"

    def bound(network: Network, x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        denoiser = Denoiser(network, schedule, config.prediction, "learned" if learned else "beta_tilde")
        return objective.vlb_loss(denoiser, x0, t, eps)

    def hybrid(network: Network, x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        denoiser = Denoiser(network, schedule, config.prediction, "learned")
        return objective.hybrid_loss(denoiser, x0, t, eps, vlb_weight=config.vlb_weight, weighting=weighting)

    def simple(network: Network, x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        norm: Literal["l1", "l2"] = "l1" if config.loss == "l1" else "l2"
        return objective.diffusion_loss(
            network, schedule, x0, t, eps, prediction=config.prediction, weighting=weighting, norm=norm
        )

    return bound if config.loss == "vlb" else hybrid if learned else simple
