"""What one frozen feature net says of a snapshot: retrieval of held-out captions among all real pictures, and KID.

A model that has trained for minutes is right about two captions of a hundred, so its recall moves by one caption or
none. The rank of the right picture moves with every caption: snapshots are compared by its geometric mean, and by KID.
Each caption is drawn from several noises, the same ones at every look: one picture for each of 214 captions leaves KID
uncertain by half of what is compared.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.settings import SIZE
from ldm.data.dataset import CaptionedPictures
from ldm.evaluation import examine
from ldm.evaluation.contrastive import load_net
from ldm.evaluation.features import Space, embed_all, pixels_of
from ldm.evaluation.gallery import Asked, Gallery
from ldm.evaluation.metrics.distribution import kid_figure
from ldm.evaluation.settings import Settings
from ldm.evaluation.subject import Subject
from ldm.pipelines.text_to_image import LDMPipeline
from ldm.system.devices import best_dtype

RESAMPLES = 200
BATCH = 16  # pictures drawn at once


def as_good(found: dict[str, Any], goal: dict[str, Any]) -> bool:
    """Whether it is at least as good in both figures."""
    return bool(found["rank"] <= goal["rank"] and found["kid"] <= goal["kid"])


@dataclass
class Judge:
    """The net, the real pictures, the captions that are asked, and a pipeline that takes any snapshot's weights."""

    model: Path
    space: Space
    gallery: Gallery
    real: dict[str, Tensor]
    asked: Asked
    steps: int
    guidance_scales: list[float]
    draws: int
    out: Path

    @classmethod
    def of(cls, model: Path, pictures: CaptionedPictures, chosen: argparse.Namespace, out: Path) -> Judge:
        """The judge that the command line describes, of models in a folder of Stable Diffusion's layout."""
        space = load_net(chosen.net, pictures, SIZE, torch.device("cpu"))
        gallery = Gallery(pictures, SIZE)
        real = gallery.vectors([space], out / "features")
        asked = gallery.ask("heldout", chosen.captions or None)
        return cls(model, space, gallery, real, asked, chosen.drawing_steps, chosen.guidance_scale, chosen.draws, out)

    def look(self, weights: Path, frozen: Path | None = None) -> dict[str, Any]:
        """{"rank", "kid", "top5", "guidance_scale"} of averaged weights, at the guidance scale of the best rank.

        Args:
            frozen: where the VAE and the text encoder that they were trained with are, if not in the model's folder.
        """
        others = frozen or self.model
        pipeline = LDMPipeline.from_pretrained(others, unet=UNet2DConditionModel.from_pretrained(self.model / "unet"))
        averaged = load_file(weights)  # in the order of the U-Net's parameters
        with torch.no_grad():
            for name, parameter in zip(sorted(averaged), pipeline.unet.parameters(), strict=True):
                parameter.copy_(averaged[name])
        subject = Subject(pipeline.to(best_dtype(torch.device("cpu"))), others)
        looks = [self.drawn(subject, scale) for scale in self.guidance_scales]
        return min(looks, key=lambda look: (look["rank"], look["kid"]))

    def drawn(self, subject: Subject, guidance_scale: float) -> dict[str, Any]:
        """The figures at one guidance scale: means over the draws and, to see how far they part, those of each.

        KID of all draws together would be too large: pictures of one caption are alike, and it compares all pairs.
        """
        name, real = self.space.name, self.real[self.space.name]
        reference = real[self.gallery.others([self.asked])]
        kids, ranks, top5 = [], [], []
        for draw in range(self.draws):
            settings = Settings(self.steps, guidance_scale, seed=draw * len(self.asked))
            paths = subject.draw_all(self.asked, settings, self.out, BATCH)
            drawn = embed_all([self.space], map(pixels_of, examine.parts(paths)))
            found, rank = examine.retrieval([self.space], self.gallery, self.real, drawn, self.asked)
            kids.append(float(kid_figure(drawn[name], reference, RESAMPLES)["value"]))
            ranks.append(rank[name].double().log().mean())
            top5.append(found[name]["top5"]["value"])

        return {
            "rank": torch.stack(ranks).mean().exp().item(),
            "kid": sum(kids) / len(kids),
            "top5": sum(top5) / len(top5),
            "guidance_scale": guidance_scale,
            "rank_of_each": [rank.exp().item() for rank in ranks],
            "kid_of_each": kids,
        }
