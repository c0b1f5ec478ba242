"""Retrieval: among all real pictures, is the nearest to a generated one a picture of the same caption?

This needs no network that reads text: the pictures of the data set are the ground truth. A prompt is a hit at k if a
real picture with its caption is among the k nearest. Two references stand beside the recall: that of the VAE's
reconstructions of the real pictures (the upper bound), and chance.

Where the data says which pictures show the same concept, the choice among these relatives alone stands beside it: it
says whether color or style is right, whatever the object.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ldm.evaluation.metrics.intervals import proportion_estimate

Metric = Literal["euclidean", "cosine"]
TOP = (1, 5)


def distances(a: Tensor, b: Tensor, metric: Metric) -> Tensor:
    """Distances [A,B] between vectors [A,D] and [B,D]; "cosine" is the Euclidean distance of the unit vectors."""
    if metric == "cosine":
        a, b = normalize(a, dim=1), normalize(b, dim=1)
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")  # exact: a copy is at distance 0


def caption_matches(prompts: Sequence[str], captions: Sequence[Sequence[str]]) -> Tensor:
    """Whether a prompt is one of a picture's captions: bool [prompts, pictures]."""
    pictures_of: dict[str, list[int]] = {}
    for picture, its in enumerate(captions):
        for caption in its:
            pictures_of.setdefault(caption, []).append(picture)
    matches = torch.zeros(len(prompts), len(captions), dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        matches[row, pictures_of.get(prompt, [])] = True
    return matches


def ranks(distance: Tensor, matches: Tensor) -> Tensor:
    """The rank, from 1, of the nearest matching picture of each query; ties count against it.

    Args:
        distance: [Q,N] from the generated to the real pictures.
        matches: bool [Q,N], at least one true in each row.
    Returns:
        int64 [Q].
    """
    nearest = distance.masked_fill(~matches, torch.inf).min(1, keepdim=True).values
    return 1 + ((distance <= nearest) & ~matches).sum(1)


def recall_among(distance: Tensor, matches: Tensor, related: Tensor) -> tuple[Tensor, Tensor]:
    """Whether the nearest related picture matches, and the chance of it, float [Q]; NaN without a choice.

    Args:
        distance: [Q,N] from the generated to the real pictures.
        matches: bool [Q,N], the prompt is the picture's caption.
        related: bool [Q,N], the picture shows the prompt's concept.
    """
    right = matches & related
    choice = right.any(1) & (related & ~matches).any(1)
    hit = ranks(distance.masked_fill(~related, torch.inf), right) == 1
    chance = right.sum(1) / related.sum(1).clamp(min=1)
    return hit.float().masked_fill(~choice, torch.nan), chance.masked_fill(~choice, torch.nan)


def relatives_estimate(hit: Tensor, chance: Tensor) -> dict[str, Any]:
    """{"top1": ..., "chance": ...} of `recall_among`, of the prompts that have a choice; empty if none has."""
    hit, chance = hit[~hit.isnan()], chance[~chance.isnan()]
    if not len(hit):
        return {}
    return {"relatives": {"top1": proportion_estimate(int(hit.sum()), len(hit)), "chance": float(chance.mean())}}


def recall_at_k(rank: Tensor, candidates: int) -> dict[str, Any]:
    """{"top1": ..., "top5": ...}, proportions with Wilson's intervals, and the same by chance."""
    found: dict[str, Any] = {f"top{k}": proportion_estimate(int((rank <= k).sum()), len(rank)) for k in TOP}
    return {**found, "chance": {f"top{k}": min(1.0, k / candidates) for k in TOP}, "candidates": candidates}
