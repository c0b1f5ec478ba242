"""Does the model read? The held-out loss with the true caption, with another picture's, and with none.

All three are taken at the same (picture, t, eps), so the differences are paired and small ones can be seen:

    shuffled - true     what the right words are worth over wrong ones
    null - true         what the right words are worth over no words

A model that ignores its context has a gap of exactly 0. Both gaps are in units of the held-out loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ldm.diffusion.parameterization import Prediction
from ldm.diffusion.schedule import NoiseSchedule
from ldm.evaluation.heldout import HeldOut, Network, by_quarter, squared_errors
from ldm.evaluation.metrics.intervals import RESAMPLES, mean_figure


@dataclass(frozen=True)
class TextQuestions:
    """Held-out questions, and what else can be said of their pictures.

    Attributes:
        true: the questions, with each picture's own caption.
        shuffled: the context [B,L,D] of another picture's caption; None if the captions can't be shuffled so that
            none keeps its place, or there are no captions.
        null: the null context [B,L,D]; None for a model that knows no text.
    """

    true: HeldOut
    shuffled: Tensor | None = None
    null: Tensor | None = None

    @classmethod
    def of(
        cls, true: HeldOut, captions: Sequence[Sequence[str]], null_context: Tensor, generator: torch.Generator
    ) -> TextQuestions:
        """Shuffle the captions, [B] lists of which the context is the first's; null_context is [1,L,D]."""
        order = derangement(captions, generator)
        context = true.conditioning.context
        assert context is not None
        shuffled = None if order is None else context[order]
        return cls(true, shuffled, null_context.to(context).expand_as(context))


@dataclass(frozen=True)
class TextUse:
    """The error of eps of every question, [4,B], with each kind of caption."""

    true: Tensor
    shuffled: Tensor | None
    null: Tensor | None

    def losses(self) -> dict[str, dict[str, float] | None]:
        """The held-out loss with each kind of caption, in total and by quarter of t."""
        return {
            "true": by_quarter(self.true),
            "shuffled": None if self.shuffled is None else by_quarter(self.shuffled),
            "null": None if self.null is None else by_quarter(self.null),
        }

    def gaps(self) -> dict[str, Tensor]:
        """The paired differences [4,B] to the true caption's error."""
        others = {"shuffled": self.shuffled, "null": self.null}
        return {name: errors - self.true for name, errors in others.items() if errors is not None}

    def figures(self, count: int = RESAMPLES) -> dict[str, Any]:
        """Each gap with its paired standard error and bootstrap interval over pictures, in total and by quarter."""
        return {
            name: {
                "total": mean_figure(gap.mean(0), count),
                **{f"q{i + 1}": mean_figure(row, count) for i, row in enumerate(gap)},
            }
            for name, gap in self.gaps().items()
        }


def measure_text_use(
    network: Network, schedule: NoiseSchedule, prediction: Prediction, questions: TextQuestions
) -> TextUse:
    """Ask every question with each kind of caption."""

    def errors(context: Tensor | None) -> Tensor:
        told = replace(questions.true.conditioning, context=context)
        return squared_errors(network, schedule, prediction, replace(questions.true, conditioning=told))

    shuffled, null = (None if context is None else errors(context) for context in (questions.shuffled, questions.null))
    return TextUse(errors(questions.true.conditioning.context), shuffled, null)


def derangement(captions: Sequence[Sequence[str]], generator: torch.Generator) -> Tensor | None:
    """A permutation that gives every picture a caption that is none of its own.

    Args:
        captions: for each of n pictures its captions; the first is the one that is handed on.
    Returns:
        int64 [n], picture i gets the caption of picture order[i]; None if there is no such permutation, which is so
        where more than half of the pictures share a caption.
    """
    own = [set(its) for its in captions]
    order = torch.randperm(len(own), generator=generator).tolist()

    def fits(place: int, giver: int) -> bool:
        return captions[giver][0] not in own[place]

    for i in range(len(order)):
        if fits(i, order[i]):
            continue
        # a partner outside whose own caption comes from outside exists as long as nobody has the majority
        for j in range(len(order)):
            if fits(i, order[j]) and fits(j, order[i]):
                order[i], order[j] = order[j], order[i]
                break
        else:
            return None
    return torch.tensor(order)
