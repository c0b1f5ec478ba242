"""Validation losses at fixed (sample, t, eps): what a training run logs to show whether it learns.

The training loss is taken at random t, and its spread hides months of progress. Here nothing is random: every
sample is noised at four timesteps, one in each quarter of [0, T), with the same noise each time. Two values
differ only because the network does. Three measurements share this scheme:

    validation loss        squared error of eps, unweighted, whatever the network predicts: runs with other
                           objectives can be compared
    caption gaps           loss with a shuffled caption, or with none, minus the loss with the true caption. The
                           differences are paired, so small ones can be seen. A network that ignores its
                           context has gaps of exactly 0
    classifier accuracy    share of correct classes. In the last quarter little signal is left, and the best
                           possible answer is the most frequent class
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ldm.diffusion.forward import q_sample
from ldm.diffusion.guidance import Classifier
from ldm.diffusion.parameterization import Prediction, to_eps, to_x0
from ldm.diffusion.schedule import NoiseSchedule
from ldm.evaluation.metrics.intervals import RESAMPLES, mean_estimate
from ldm.models.conditioning import Conditioning

QUARTERS = 4
#: (x_t [B,C,h,w], t [B] on the CPU, conditioning) => prediction, shaped like x_t.
Network = Callable[[Tensor, Tensor, Conditioning], Tensor]


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


@dataclass(frozen=True)
class ValidationSet:
    """Fixed inputs of the validation loss.

    Attributes:
        x0: [B,C,h,w].
        conditioning: of the B samples.
        t: int64 [4,B], one row a quarter.
        eps: [4,B,C,h,w].
    """

    x0: Tensor
    conditioning: Conditioning
    t: Tensor
    eps: Tensor

    @classmethod
    def fixed(cls, x0: Tensor, conditioning: Conditioning, T: int, generator: torch.Generator) -> ValidationSet:
        """Fix t and eps for these latents, from a CPU generator."""
        return cls(x0, conditioning, *fixed_noise(x0, T, generator))

    @classmethod
    def at(
        cls, x0: Tensor, conditioning: Conditioning, timesteps: Sequence[int], generator: torch.Generator
    ) -> ValidationSet:
        """Fix eps for these latents at each of these timesteps, a row each in place of the quarters."""
        t = torch.tensor(timesteps)[:, None].expand(-1, len(x0))
        return cls(x0, conditioning, t, torch.randn(*t.shape, *x0.shape[1:], generator=generator).to(x0.device))


@torch.no_grad()
def squared_errors(
    network: Network,
    schedule: NoiseSchedule,
    prediction: Prediction,
    validation: ValidationSet,
    batch_size: int = 64,
    of: Literal["eps", "x0"] = "eps",
) -> Tensor:
    """The mean squared error of eps, or of x0, of every (sample, t), float32 [4,B] on the CPU, a row a quarter of t."""
    convert = to_eps if of == "eps" else to_x0
    by_quarter = []
    for t, eps in zip(validation.t, validation.eps, strict=True):
        errors = []
        for part in torch.arange(len(validation.x0)).split(batch_size):
            x0, noise = validation.x0[part], eps[part]
            x_t = q_sample(schedule, x0, t[part], noise)
            output = network(x_t, t[part], validation.conditioning[part]).float()
            alpha, sigma = schedule.at(t[part], x0)
            answer = noise if of == "eps" else x0
            errors.append((convert(prediction, output, x_t, alpha, sigma) - answer).square().flatten(1).mean(1))
        by_quarter.append(torch.cat(errors).cpu())
    return torch.stack(by_quarter)


def by_quarter(errors: Tensor) -> dict[str, float]:
    """Errors [4,B] => their means {"total": ..., "q1": ..., "q4": ...}; q1 is the quarter with the least noise."""
    quarters = errors.mean(1).tolist()
    return {"total": sum(quarters) / QUARTERS, **{f"q{i + 1}": value for i, value in enumerate(quarters)}}


def by_timestep(errors: Tensor, timesteps: Sequence[int]) -> dict[str, float]:
    """Errors [N,B] at N timesteps => their means {"total": ..., "t999": ..., "t499": ...}."""
    means = errors.mean(1).tolist()
    return {"total": sum(means) / len(means), **{f"t{t}": value for t, value in zip(timesteps, means, strict=True)}}


@dataclass(frozen=True)
class CaptionedValidationSet:
    """A validation set, and other contexts for the same samples.

    Attributes:
        true: the validation set, with each picture's own caption.
        shuffled: the context [B,L,D] of another picture's caption; None if there are no captions, or if every
            permutation leaves some picture with a caption of its own.
        null: the null context [B,L,D]; None for a model without text.
    """

    true: ValidationSet
    shuffled: Tensor | None = None
    null: Tensor | None = None

    @classmethod
    def of(
        cls, true: ValidationSet, captions: Sequence[Sequence[str]], null_context: Tensor, generator: torch.Generator
    ) -> CaptionedValidationSet:
        """Shuffle the captions, [B] lists whose first entries made the context; null_context is [1,L,D]."""
        order = derangement(captions, generator)
        context = true.conditioning.context
        assert context is not None
        shuffled = None if order is None else context[order]
        return cls(true, shuffled, null_context.to(context).expand_as(context))


@dataclass(frozen=True)
class CaptionLosses:
    """The squared errors of eps [4,B] with the true, a shuffled and the null caption."""

    true: Tensor
    shuffled: Tensor | None
    null: Tensor | None

    @classmethod
    def together(cls, parts: Sequence[CaptionLosses]) -> CaptionLosses:
        """Those of several sets as of one."""

        def joined(name: str) -> Tensor | None:
            errors = [getattr(part, name) for part in parts]
            return None if any(each is None for each in errors) else torch.cat(errors, 1)

        true = joined("true")
        assert true is not None
        return cls(true, joined("shuffled"), joined("null"))

    def losses(self) -> dict[str, dict[str, float] | None]:
        """The validation loss with each kind of caption, in total and by quarter of t."""
        return {
            "true": by_quarter(self.true),
            "shuffled": None if self.shuffled is None else by_quarter(self.shuffled),
            "null": None if self.null is None else by_quarter(self.null),
        }

    def gaps(self) -> dict[str, Tensor]:
        """The paired differences [4,B] to the error with the true caption."""
        others = {"shuffled": self.shuffled, "null": self.null}
        return {name: errors - self.true for name, errors in others.items() if errors is not None}

    def gap_estimates(self, resamples: int = RESAMPLES) -> dict[str, Any]:
        """Each gap with its paired standard error and bootstrap interval over pictures, in total and by quarter."""
        return {
            name: {
                "total": mean_estimate(gap.mean(0), resamples),
                **{f"q{i + 1}": mean_estimate(row, resamples) for i, row in enumerate(gap)},
            }
            for name, gap in self.gaps().items()
        }


def caption_losses(
    network: Network,
    schedule: NoiseSchedule,
    prediction: Prediction,
    validation: CaptionedValidationSet,
    of: Literal["eps", "x0"] = "eps",
) -> CaptionLosses:
    """The validation loss with each kind of caption."""

    def errors(true: ValidationSet) -> Tensor:
        return squared_errors(network, schedule, prediction, true, of=of)

    return with_each_caption(errors, validation)


def with_each_caption(errors: Callable[[ValidationSet], Tensor], validation: CaptionedValidationSet) -> CaptionLosses:
    """A measurement [4,B] of a validation set, taken with each kind of caption."""

    def found(context: Tensor | None) -> Tensor:
        conditioning = replace(validation.true.conditioning, context=context)
        return errors(replace(validation.true, conditioning=conditioning))

    shuffled, null = (None if context is None else found(context) for context in (validation.shuffled, validation.null))
    return CaptionLosses(found(validation.true.conditioning.context), shuffled, null)


def derangement(captions: Sequence[Sequence[str]], generator: torch.Generator) -> Tensor | None:
    """A permutation that gives every picture a caption that is none of its own.

    Args:
        captions: the captions of each of n pictures; only the first is passed on to another picture.
    Returns:
        int64 [n]: picture i gets the caption of picture order[i]. None if there is no such permutation, which is
        the case if more than half of the pictures share a caption.
    """
    own = [set(its) for its in captions]
    order = torch.randperm(len(own), generator=generator).tolist()

    def fits(place: int, giver: int) -> bool:
        return captions[giver][0] not in own[place]

    for i in range(len(order)):
        if fits(i, order[i]):
            continue
        # a swap exists as long as no caption has the majority: both its place and its caption are from elsewhere
        for j in range(len(order)):
            if fits(i, order[j]) and fits(j, order[i]):
                order[i], order[j] = order[j], order[i]
                break
        else:
            return None
    return torch.tensor(order)


@dataclass(frozen=True)
class LabeledValidationSet:
    """Fixed inputs of a classifier: x0 [B,C,h,w], labels int64 [B], t int64 [4,B], eps [4,B,C,h,w]."""

    x0: Tensor
    labels: Tensor
    t: Tensor
    eps: Tensor

    @classmethod
    def fixed(cls, x0: Tensor, labels: Tensor, T: int, generator: torch.Generator) -> LabeledValidationSet:
        """Fix t and eps for these latents, from a CPU generator."""
        return cls(x0, labels, *fixed_noise(x0, T, generator))


@torch.no_grad()
def classifier_accuracy(
    classifier: Classifier, schedule: NoiseSchedule, validation: LabeledValidationSet, batch_size: int = 256
) -> dict[str, float]:
    """Accuracy {"total": ..., "q1": ..., "q4": ...}, q1 with the least noise; and the cross entropy "loss" in nats."""
    shares, losses = [], []
    for t, eps in zip(validation.t, validation.eps, strict=True):
        logits = torch.cat(
            [
                classifier(q_sample(schedule, validation.x0[part], t[part], eps[part]), t[part]).float()
                for part in torch.arange(len(t)).split(batch_size)
            ]
        )
        shares.append(float((logits.argmax(1) == validation.labels).float().mean()))
        losses.append(float(cross_entropy(logits, validation.labels)))
    quarters = {f"q{i + 1}": share for i, share in enumerate(shares)}
    return {"total": sum(shares) / QUARTERS, **quarters, "loss": sum(losses) / QUARTERS}
