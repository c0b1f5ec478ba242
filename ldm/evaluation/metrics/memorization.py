"""Does it draw, or does it copy? How near drawn pictures lie to training pictures, against how near held-out ones do.

Real pictures that the model never saw are as near to the training pictures as new pictures should be. A near-copy is
a picture that lies nearer to some training picture than nearly all (95 %) held-out pictures lie to any. Some of the
held-out pictures are near-copies by this definition, more than 5 % where the data has duplicates; drawn pictures copy
if clearly more of them are: if the two shares' Wilson intervals don't touch. The distribution of nearest distances is
compared as in Meehan et al. 2020, by the Mann-Whitney statistic of section 3.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from ldm.evaluation.metrics.intervals import share_figure
from ldm.evaluation.metrics.retrieval import Metric, distances

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
NEAR = 0.05
Verdict = Literal["copies", "some copies", "no sign of copies"]


def nearest(vectors: Tensor, training: Tensor, metric: Metric) -> tuple[Tensor, Tensor]:
    """The distance of each vector [N,D] to the nearest training vector [M,D], and its number: float32, int64 [N]."""
    parts = [distances(part, training, metric).min(1) for part in vectors.split(256)]
    return torch.cat([part.values for part in parts]), torch.cat([part.indices for part in parts])


def memorization(drawn: Tensor, heldout: Tensor) -> dict[str, Any]:
    """What the nearest distances say.

    Args:
        drawn: [N] the drawn pictures' distances to their nearest training pictures.
        heldout: [M] the held-out pictures'.
    Returns:
        quantiles of both; the ratio of their medians; the shares of near-copies among both; the probability that a
        drawn picture lies nearer than a held-out one (1/2 for a model that draws like the data); and the verdict,
        "copies" where most drawn pictures are near-copies.
    """
    drawn, heldout = drawn.double(), heldout.double()
    near = float(heldout.quantile(NEAR, interpolation="lower"))
    copies, expected = (share_figure(int((values <= near).sum()), len(values)) for values in (drawn, heldout))
    difference = drawn[:, None] - heldout[None]
    nearer = float(((difference < 0).double() + (difference == 0).double() / 2).mean())
    median = float(heldout.median())
    verdict: Verdict = "no sign of copies"
    if copies["low"] > expected["high"]:
        verdict = "copies" if copies["value"] > 0.5 else "some copies"
    return {
        "quantiles": {
            "at": list(QUANTILES),
            "drawn": drawn.quantile(torch.tensor(QUANTILES, dtype=torch.float64)).tolist(),
            "heldout": heldout.quantile(torch.tensor(QUANTILES, dtype=torch.float64)).tolist(),
        },
        "median_ratio": float(drawn.median()) / median if median > 0 else None,
        "near": near,
        "near_copies": {"drawn": copies, "heldout": expected},
        "nearer_than_heldout": nearer,
        "verdict": verdict,
    }
