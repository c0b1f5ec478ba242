"""How often a classifier of noisy latents is right on held-out pictures, by quarter of t.

As in heldout.py nothing is random: the same t, one in each quarter, and the same noise at every call. In the
last quarter little is left to see, and the best that a classifier can do is to name the most frequent class.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ldm.diffusion.forward import q_sample
from ldm.diffusion.guidance import Classifier
from ldm.diffusion.schedule import NoiseSchedule
from ldm.evaluation.heldout import QUARTERS, fixed_noise


@dataclass(frozen=True)
class LabelledLatents:
    """Fixed questions: x0 [B,C,h,w], labels int64 [B], t int64 [4,B] (one row a quarter), eps [4,B,C,h,w]."""

    x0: Tensor
    labels: Tensor
    t: Tensor
    eps: Tensor

    @classmethod
    def fixed(cls, x0: Tensor, labels: Tensor, T: int, generator: torch.Generator) -> LabelledLatents:
        """Questions about these latents, with t and eps drawn once from the generator (a CPU one)."""
        return cls(x0, labels, *fixed_noise(x0, T, generator))


@torch.no_grad()
def accuracy(
    classifier: Classifier, schedule: NoiseSchedule, questions: LabelledLatents, batch_size: int = 256
) -> dict[str, float]:
    """Share of right answers {"total": ..., "q1": ..., "q4": ...}, q1 with the least noise; and the "loss" in nats."""
    shares, losses = [], []
    for t, eps in zip(questions.t, questions.eps, strict=True):
        logits = torch.cat(
            [
                classifier(q_sample(schedule, questions.x0[part], t[part], eps[part]), t[part]).float()
                for part in torch.arange(len(t)).split(batch_size)
            ]
        )
        shares.append(float((logits.argmax(1) == questions.labels).float().mean()))
        losses.append(float(cross_entropy(logits, questions.labels)))
    by_quarter = {f"q{i + 1}": share for i, share in enumerate(shares)}
    return {"total": sum(shares) / QUARTERS, **by_quarter, "loss": sum(losses) / QUARTERS}
