"""Negative log-likelihood of held-out latents under a model, by t: the bound of Ho et al. 2020, eq. 5, over T steps.

    -log p(x0) <= L_T + sum_{0 < t < T} L_t + L_0       prior + denoising steps + decoder, nats per dimension

It bounds the density of the LATENTS that the VAE samples for these pictures, not that of pixels. It may be negative.
It compares models with the same VAE on the same pictures, and nothing else (why: ldm.diffusion.likelihood).

T network calls a picture are too many, so t is sampled: the steps are cut into strata, each picture gets one t of each
stratum, and its term is divided by the probability p_t of that t. This is unbiased for any strata and any p; the
variance depends on them. Here all strata have the same weight, and p_t is proportional to w_t:

    L_t = (snr_{t-1} - snr_t) / 2 |x0 - pred_x0|**2        (Kingma et al. 2021, with beta_tilde)
    w_t = (snr_{t-1} - snr_t) sigma_t**2                    its value for x0 ~ N(0, I), whose error is sigma_t**2

since latents have variance 1. Prior and decoder are not sampled.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ldm.data.batches import load_pixels
from ldm.data.dataset import CaptionedPictures
from ldm.diffusion.forward import q_sample
from ldm.diffusion.likelihood import nats_per_dim, prior_kl, vlb_term
from ldm.diffusion.parameterization import Prediction
from ldm.diffusion.reverse import Denoiser
from ldm.diffusion.schedule import NoiseSchedule, prediction_from_config, schedule_from_config
from ldm.evaluation.validation import Network
from ldm.models.conditioning import Conditioning, denoise
from ldm.models.text_encoder import TextEncoder
from ldm.models.vae import encode

MEANING = "a bound on -log density of the VAE's latents, nats per latent dimension; not of pixels; may be negative"


@dataclass(frozen=True)
class Term:
    """The sum of L_t over the steps first <= t <= last, nats per dimension: its mean and that mean's standard error."""

    first: int
    last: int
    nats_per_dim: float
    standard_error: float


@dataclass(frozen=True)
class NLL:
    """The bound, nats per dimension.

    Attributes:
        nats_per_dim: mean over the pictures.
        standard_error: of the mean, from pictures, timesteps and noise together.
        pictures: how many.
        dimensions: of one picture's latents.
        timesteps: T.
        network_calls: for each picture.
        prior: L_T, the information about x0 that is left at the last timestep.
        terms: L_t from the clean end to the noisy one; the first, t = 0, is the decoder.
    """

    nats_per_dim: float
    standard_error: float
    pictures: int
    dimensions: int
    timesteps: int
    network_calls: int
    prior: float
    terms: tuple[Term, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and lists, for JSON."""
        return {"meaning": MEANING, **asdict(self)}

    def table(self) -> str:
        """The bound and its parts as a text table."""
        rows = [
            f"NLL {self.nats_per_dim:.4f} ± {self.standard_error:.4f} nats/dim of latents "
            f"({self.pictures} pictures, {self.dimensions} dimensions, {self.network_calls} of {self.timesteps} steps)",
            f"{'t':>9}  {'nats/dim':>10}  {'± s.e.':>8}",
        ]
        for term in self.terms:
            steps = f"{term.first}" if term.first == term.last else f"{term.first}-{term.last}"
            rows.append(f"{steps:>9}  {term.nats_per_dim:>10.5f}  {term.standard_error:>8.5f}")
        return "\n".join([*rows, f"{'prior':>9}  {self.prior:>10.5f}", MEANING])


def step_weights(schedule: NoiseSchedule) -> Tensor:
    """The terms of the steps 1 <= t < T if latents were N(0, I), up to a factor; float64 [T - 1]."""
    return (schedule.snr[:-1] - schedule.snr[1:]) * schedule.sigma[1:] ** 2


def strata(schedule: NoiseSchedule, most: int) -> list[range]:
    """The steps 1 <= t < T in at most `most` contiguous ranges of about equal weight; one step each if most allows."""
    if most >= schedule.T - 1:
        return [range(t, t + 1) for t in range(1, schedule.T)]
    weights = step_weights(schedule)
    middle = (weights.cumsum(0) - weights / 2) / weights.sum()  # (T - 1,) from 0 to 1
    _, lengths = torch.unique_consecutive((middle * most).long(), return_counts=True)
    ends = lengths.cumsum(0) + 1
    return [range(int(end - length), int(end)) for end, length in zip(ends, lengths, strict=True)]


@torch.no_grad()
def nll(
    network: Network,
    schedule: NoiseSchedule,
    prediction: Prediction,
    x0: Tensor,
    conditioning: Conditioning,
    *,
    generator: torch.Generator,
    most_strata: int = 50,
    batch_size: int = 64,
    progress: bool = True,
) -> NLL:
    """The bound on -log p(x0), with beta_tilde as the variance of the reverse steps.

    Args:
        network: (x_t [B,C,h,w], t [B] on the CPU, conditioning) => prediction [B,C,h,w].
        x0: [N,C,h,w] latents, at least two, sampled from the posterior as in training.
        conditioning: of the N latents.
        generator: of timesteps and noise, a CPU one.
        most_strata: network calls for each picture, besides that of the decoder.
    Raises:
        ValueError: for fewer than two pictures, which have no standard error.
    """
    if len(x0) < 2:
        raise ValueError(f"nll: expected at least two pictures, got {len(x0)}")
    if most_strata < 1:
        raise ValueError(f"most_strata: expected at least 1, got {most_strata}")
    runs = [range(1), *strata(schedule, most_strata)]
    weights = torch.cat([torch.ones(1, dtype=torch.float64), step_weights(schedule)])  # (T,)
    parts = torch.arange(len(x0)).split(batch_size)
    terms = torch.zeros(len(runs), len(x0), dtype=torch.float64)  # (strata, N), nats per dimension
    with tqdm(total=len(runs) * len(parts), desc="likelihood", unit="batch", disable=not progress) as bar:
        for run, term in zip(runs, terms, strict=True):
            for part in parts:
                clean, condition = x0[part], conditioning[part]
                p = weights[run.start : run.stop] / weights[run.start : run.stop].sum()
                sampled = torch.multinomial(p, len(part), replacement=True, generator=generator)
                t = run.start + sampled
                eps = torch.randn(clean.shape, generator=generator, dtype=clean.dtype).to(clean.device)
                denoiser = Denoiser(partial(_conditioned, network, condition), schedule, prediction)
                nats = vlb_term(denoiser, clean, q_sample(schedule, clean, t, eps), t, t - 1)
                term[part] = nats_per_dim(nats, clean).double().cpu() / p[sampled]
                bar.update()
    prior = nats_per_dim(prior_kl(schedule, x0), x0).double().cpu()
    root = math.sqrt(len(x0))
    total = terms.sum(0) + prior  # (N,)
    return NLL(
        nats_per_dim=float(total.mean()),
        standard_error=float(total.std()) / root,
        pictures=len(x0),
        dimensions=x0[0].numel(),
        timesteps=schedule.T,
        network_calls=len(runs),
        prior=float(prior.mean()),
        terms=tuple(
            Term(run.start, run.stop - 1, float(term.mean()), float(term.std()) / root)
            for run, term in zip(runs, terms, strict=True)
        ),
    )


def _conditioned(network: Network, conditioning: Conditioning, x_t: Tensor, t: Tensor) -> Tensor:
    return network(x_t, t, conditioning)


@torch.no_grad()
def nll_of_pipeline(
    pipeline: Any,
    pictures: CaptionedPictures,
    *,
    most_strata: int = 50,
    batch_size: int = 64,
    seed: int = 0,
    progress: bool = True,
) -> NLL:
    """The bound for a model and held-out pictures, each with its first caption and its class.

    Args:
        pipeline: an LDMPipeline; its scheduler's config describes the process that the U-Net was trained on.
        pictures: captioned, and labeled if the model has classes.
        seed: of the samples of the VAE's posterior, the timesteps and the noise.
    Raises:
        ValueError: if the model takes a conditioning picture or is one of few steps, or its scheduler has no known
            noise schedule.
    """
    if pipeline.extra_channels:
        raise ValueError(
            "nll: this model takes a conditioning picture; the bound supports text, classes and numbers only"
        )
    if pipeline.unet.config.time_cond_proj_dim is not None or pipeline.scheduler.config.get("solver_order") == 1:
        raise ValueError("nll: this model knows a few steps alone, and the bound is a sum over every timestep")
    config, device, size = pipeline.scheduler.config, pipeline.unet.device, pipeline.edge("height")
    schedule, prediction = schedule_from_config(config), prediction_from_config(config)
    rng = torch.Generator().manual_seed(seed)
    text = TextEncoder(pipeline.tokenizer, pipeline.text_encoder) if pipeline.tokenizer is not None else None
    latents, contexts = [], []
    starts = range(0, len(pictures), batch_size)
    for start in tqdm(starts, desc="encoding pictures", unit="batch", disable=not progress):
        rows = [pictures[i] for i in range(start, min(start + batch_size, len(pictures)))]
        posterior = encode(pipeline.vae, torch.stack([load_pixels(row, size) for row in rows]).to(device))
        noise = torch.randn(posterior.mean.shape, generator=rng).to(device)
        latents.append(posterior.sample(noise))
        if text is not None:
            contexts.append(text.encode([row.captions[0] for row in rows]))
    named = pipeline.numbers.vectors(pictures) if pipeline.numbers else None
    named = pipeline.labels.ids(pictures) if pipeline.labels else named
    conditioning = Conditioning(
        context=torch.cat(contexts) if contexts else None,
        class_labels=None if named is None else torch.from_numpy(named).to(device),
    )
    return nll(
        lambda x_t, t, conditioning: denoise(pipeline.unet, x_t, t, conditioning).float(),
        schedule,
        prediction,
        torch.cat(latents),
        conditioning,
        generator=rng,
        most_strata=most_strata,
        batch_size=batch_size,
        progress=progress,
    )
