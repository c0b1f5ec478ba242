"""Memorization: are generated pictures nearer to the training pictures than held-out pictures are?

Real pictures that the model never saw are as near to the training pictures as new pictures should be. A near-copy is
a picture that lies nearer to some training picture than 95 % of the held-out pictures lie to any. By this definition
about 5 % of the held-out pictures are near-copies, more if the data has duplicates. The model copies if clearly more of
its pictures are: if the Wilson intervals of the two proportions don't touch. The distributions of nearest distances are
compared as in Meehan et al. 2020, by the Mann-Whitney statistic of section 3.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from ldm.evaluation.metrics.intervals import proportion_estimate
from ldm.evaluation.metrics.retrieval import Metric, distances

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
NEAR = 0.05
Verdict = Literal["copies", "some copies", "no sign of copies"]


def nearest(vectors: Tensor, training: Tensor, metric: Metric) -> tuple[Tensor, Tensor]:
    """The distance of each vector [N,D] to the nearest training vector [M,D], and its index: float32, int64 [N]."""
    parts = [distances(part, training, metric).min(1) for part in vectors.split(256)]
    return torch.cat([part.values for part in parts]), torch.cat([part.indices for part in parts])


def memorization(generated: Tensor, heldout: Tensor) -> dict[str, Any]:
    """Compare the distances of generated pictures to their nearest training pictures with those of held-out ones.

    Args:
        generated, heldout: distances [N], [M].
    Returns:
        quantiles of both; the ratio of their medians; the proportions of near-copies; the probability that a generated
        picture lies nearer than a held-out one (1/2 for a model that samples the data distribution); and the verdict,
        "copies" if most generated pictures are near-copies.
    """
    generated, heldout = generated.double(), heldout.double()
    near = float(heldout.quantile(NEAR, interpolation="lower"))
    copies, expected = (
        proportion_estimate(int((values <= near).sum()), len(values)) for values in (generated, heldout)
    )
    difference = generated[:, None] - heldout[None]
    nearer = float(((difference < 0).double() + (difference == 0).double() / 2).mean())
    median = float(heldout.median())
    verdict: Verdict = "no sign of copies"
    if copies["low"] > expected["high"]:
        verdict = "copies" if copies["value"] > 0.5 else "some copies"
    return {
        "quantiles": {
            "at": list(QUANTILES),
            "drawn": generated.quantile(torch.tensor(QUANTILES, dtype=torch.float64)).tolist(),
            "heldout": heldout.quantile(torch.tensor(QUANTILES, dtype=torch.float64)).tolist(),
        },
        "median_ratio": float(generated.median()) / median if median > 0 else None,
        "near": near,
        "near_copies": {"drawn": copies, "heldout": expected},
        "nearer_than_heldout": nearer,
        "verdict": verdict,
    }
