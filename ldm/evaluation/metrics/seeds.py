"""Several seeds of one prompt: does every seed show it, and do the seeds differ?

One seed of each prompt hides that a model sometimes fails, or that it has learned one picture by heart. Reliability is
the share of prompts of which every seed is a hit. Coverage needs captions that several real pictures have, such as the
same thing by different artists: the share of a caption's pictures that are the nearest real picture to some seed. A
seed that is nearest to a picture of another caption covers nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ldm.evaluation.metrics.intervals import mean_estimate, proportion_estimate
from ldm.evaluation.metrics.retrieval import Metric, distances, ranks, recall_at_k


def seed_metrics(
    vectors: Tensor, real: Tensor, matches: Tensor, groups: Sequence[str], metric: Metric, resamples: int
) -> dict[str, Any]:
    """Recall over all seeds, reliability and coverage.

    Args:
        vectors: [P,S,D], of S seeds of P prompts.
        real: [N,D], all real pictures.
        matches: bool [P,N], whether a real picture has the prompt as a caption; at least one in each row.
        groups: of each prompt, for a recall of each group; all the same for none.
    """
    seeds, rank, covered, expected = vectors.shape[1], [], [], []
    for mine, right in zip(vectors, matches, strict=True):
        distance = distances(mine, real, metric)  # (S, N)
        rank.append(ranks(distance, right.expand(seeds, -1)))
        pictures = int(right.sum())
        if pictures > 1:
            hits = distance.argmin(1)[rank[-1] == 1]
            covered.append(len(hits.unique()) / pictures)
            expected.append(1 - (1 - 1 / pictures) ** seeds)
    table = torch.stack(rank)  # (P, S)
    found: dict[str, Any] = {
        "seeds": seeds,
        "prompts": len(vectors),
        "recall": recall_at_k(table.flatten(), len(real)),
        "reliability": proportion_estimate(int((table == 1).all(1).sum()), len(table)),
    }
    if len(set(groups)) > 1:
        found["groups"] = {
            group: recall_at_k(table[torch.tensor([each == group for each in groups])].flatten(), len(real))
            for group in sorted(set(groups))
        }
    if covered:
        found["coverage"] = mean_estimate(torch.tensor(covered), resamples)
        found["coverage"]["of_even_choice"] = sum(expected) / len(expected)
    return found
