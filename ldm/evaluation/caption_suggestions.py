"""Captions for pictures that have none: those of a list that the in-domain CLIP finds nearest.

The list is by default every caption that the data set has; its in-domain CLIP was trained on them. Nothing is made up:
a suggestion is a caption of another picture, and right as far as the data repeat themselves.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ldm.data.images import to_pixels, to_square
from ldm.evaluation.features import FeatureExtractor

BATCH = 32
FEW = 100  # captioned pictures; fewer call for a look at what they led to
EDGE = 64  # of the crops; the network resizes what it wants otherwise


@torch.no_grad()
def suggest(
    extractor: FeatureExtractor, pictures: Iterable[Image.Image], candidates: Sequence[str], most: int = 5
) -> list[list[tuple[str, float]]]:
    """The nearest captions of each picture with their cosine, the nearest first.

    Args:
        extractor: with a text tower.
        pictures: mode RGB, of any shape; their center crops are embedded.
        candidates: the captions to choose from, without duplicates.
        most: of each picture; fewer if there are fewer candidates.
    """
    assert extractor.embed_pair is not None and extractor.embed_captions is not None
    captions = extractor.embed_captions(candidates)  # (captions, D)
    found: list[list[tuple[str, float]]] = []

    def finish(batch: list[Tensor]) -> None:
        assert extractor.embed_pair is not None
        cosines = extractor.embed_pair(torch.stack(batch)) @ captions.T  # (B, captions)
        best = cosines.topk(min(most, len(candidates)), dim=1)
        for values, places in zip(best.values.tolist(), best.indices.tolist(), strict=True):
            found.append([(candidates[place], value) for place, value in zip(places, values, strict=True)])

    waiting: list[Tensor] = []
    for picture in pictures:
        waiting.append(torch.from_numpy(to_pixels(to_square(picture, EDGE))))
        if len(waiting) == BATCH:
            finish(waiting)
            waiting = []
    if waiting:
        finish(waiting)
    return found


def doubts(card: dict[str, Any]) -> list[str]:
    """Why the suggestions of an in-domain CLIP are unsure, a line each; none where they are not.

    Args:
        card: of the network: the number `n` of its training pictures, and its recall from pictures to captions.
    """
    top5 = card["recall"]["picture to caption"]["top5"]
    chance = card["recall"]["picture to caption"]["chance"]["top5"]
    found = []
    if card["n"] < FEW:
        found.append(
            f"the in-domain CLIP has learned from {card['n']} captioned pictures, fewer than {FEW}; look at its "
            "suggestions, caption more pictures by hand, or name a captioning model in --from"
        )
    if top5["low"] <= chance:
        split = {"heldout": "held-out", "train": "training"}[card["recall_on"]]
        found.append(
            f"on {split} pictures the in-domain CLIP is no better than chance: top-5 recall {top5['value']:.1%} "
            f"({top5['low']:.1%} to {top5['high']:.1%}), chance {chance:.1%}; its suggestions are guesses"
        )
    return found
