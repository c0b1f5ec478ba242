"""Does it draw what was asked? Among all real pictures, is the nearest to a drawn one a picture of that caption?

It needs no judge that knows words: the data set's own pictures are the answers. A caption counts as hit at k if a
real picture of the same caption is among the k nearest. How high that can get is said beside it: the same for the
VAE's reconstructions of the real pictures (`ceiling`), and by chance (`chance`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ldm.evaluation.metrics.intervals import share_figure

Metric = Literal["euclidean", "cosine"]
TOP = (1, 5)


def distances(a: Tensor, b: Tensor, metric: Metric) -> Tensor:
    """Distances [A,B] between vectors [A,D] and [B,D]; cosine's are Euclidean between unit vectors, the same order."""
    if metric == "cosine":
        a, b = normalize(a, dim=1), normalize(b, dim=1)
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")  # exact: a copy is at distance 0


def same_caption(asked: Sequence[str], captions: Sequence[Sequence[str]]) -> Tensor:
    """Which pictures answer which caption: bool [asked, pictures]."""
    pictures_of: dict[str, list[int]] = {}
    for picture, its in enumerate(captions):
        for caption in its:
            pictures_of.setdefault(caption, []).append(picture)
    answers = torch.zeros(len(asked), len(captions), dtype=torch.bool)
    for question, caption in enumerate(asked):
        answers[question, pictures_of.get(caption, [])] = True
    return answers


def ranks(distance: Tensor, answers: Tensor) -> Tensor:
    """The rank, from 1, of the nearest right picture of each question; ties count against it.

    Args:
        distance: [Q,N] from what was drawn to the real pictures.
        answers: bool [Q,N], at least one true in each row.
    Returns:
        int64 [Q].
    """
    nearest = distance.masked_fill(~answers, torch.inf).min(1, keepdim=True).values
    return 1 + ((distance <= nearest) & ~answers).sum(1)


def recall(rank: Tensor, candidates: int) -> dict[str, Any]:
    """{"top1": ..., "top5": ...}, shares with Wilson's intervals, and what guessing would reach."""
    told: dict[str, Any] = {f"top{k}": share_figure(int((rank <= k).sum()), len(rank)) for k in TOP}
    return {**told, "chance": {f"top{k}": min(1.0, k / candidates) for k in TOP}, "candidates": candidates}
