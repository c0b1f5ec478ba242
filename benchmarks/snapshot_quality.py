"""The quality of a snapshot of weights: retrieval of held-out captions among all real pictures, and KID.

The features are those of the in-domain CLIP. A model trained for minutes gets two captions of a hundred right, so its
recall changes by one caption or none. The rank of the right picture changes with every caption: snapshots are compared
by its geometric mean, and by KID. Each caption is generated from several noises, the same for every snapshot: with one
picture for each of 214 captions, KID is uncertain by half of the difference that is compared.
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
from ldm.evaluation import sections
from ldm.evaluation.evaluated_model import EvaluatedModel, SamplingSettings
from ldm.evaluation.evaluation_set import EvaluationSet, PromptSet
from ldm.evaluation.features import FeatureExtractor, extract_features, in_batches, read_pixels
from ldm.evaluation.in_domain_clip import load_clip
from ldm.evaluation.metrics.distribution import kid_estimate
from ldm.pipelines.text_to_image import LDMPipeline
from ldm.system.devices import best_dtype

RESAMPLES = 200
BATCH = 16  # pictures generated at once


def as_good(found: dict[str, Any], goal: dict[str, Any]) -> bool:
    """Whether both rank and KID are at least as good."""
    return bool(found["rank"] <= goal["rank"] and found["kid"] <= goal["kid"])


@dataclass
class SnapshotEvaluator:
    """Evaluates any snapshot of a U-Net's weights on the same prompts, noises and real pictures."""

    model: Path
    extractor: FeatureExtractor
    data: EvaluationSet
    real: dict[str, Tensor]
    prompts: PromptSet
    steps: int
    guidance_scales: list[float]
    repeats: int
    out: Path

    @classmethod
    def of(cls, model: Path, pictures: CaptionedPictures, chosen: argparse.Namespace, out: Path) -> SnapshotEvaluator:
        """The evaluator that the command line describes, of models in a folder of Stable Diffusion's layout."""
        extractor = load_clip(chosen.net, pictures, SIZE, torch.device("cpu"))
        data = EvaluationSet(pictures, SIZE)
        real = data.features([extractor], out / "features")
        prompts = data.prompts("heldout", chosen.captions or None)
        steps, scales, repeats = chosen.sampling_steps, chosen.guidance_scale, chosen.repeats
        return cls(model, extractor, data, real, prompts, steps, scales, repeats, out)

    def evaluate(self, weights: Path, frozen: Path | None = None) -> dict[str, Any]:
        """{"rank", "kid", "top5", "guidance_scale"} of averaged weights, at the guidance scale with the best rank.

        Args:
            frozen: the folder of VAE and text encoder of the training, if not the model's.
        """
        others = frozen or self.model
        pipeline = LDMPipeline.from_pretrained(others, unet=UNet2DConditionModel.from_pretrained(self.model / "unet"))
        averaged = load_file(weights)  # in the order of the U-Net's parameters
        with torch.no_grad():
            for name, parameter in zip(sorted(averaged), pipeline.unet.parameters(), strict=True):
                parameter.copy_(averaged[name])
        model = EvaluatedModel(pipeline.to(best_dtype(torch.device("cpu"))), others)
        found = [self.evaluate_at(model, scale) for scale in self.guidance_scales]
        return min(found, key=lambda each: (each["rank"], each["kid"]))

    def evaluate_at(self, model: EvaluatedModel, guidance_scale: float) -> dict[str, Any]:
        """The metrics at one guidance scale: means over the repeats, and those of each repeat for their spread.

        KID of all repeats together would be too large: pictures of one caption are alike, and it compares all pairs.
        """
        name, real = self.extractor.name, self.real[self.extractor.name]
        reference = real[self.data.reference([self.prompts])]
        kids, ranks, top5 = [], [], []
        for repeat in range(self.repeats):
            settings = SamplingSettings(self.steps, guidance_scale, seed=repeat * len(self.prompts))
            paths = model.generate_all(self.prompts, settings, self.out, BATCH)
            generated = extract_features([self.extractor], map(read_pixels, in_batches(paths)))
            recall, rank = sections.retrieval([self.extractor], self.data, self.real, generated, self.prompts)
            kids.append(float(kid_estimate(generated[name], reference, RESAMPLES)["value"]))
            ranks.append(rank[name].double().log().mean())
            top5.append(recall[name]["top5"]["value"])

        return {
            "rank": torch.stack(ranks).mean().exp().item(),
            "kid": sum(kids) / len(kids),
            "top5": sum(top5) / len(top5),
            "guidance_scale": guidance_scale,
            "rank_of_each": [rank.exp().item() for rank in ranks],
            "kid_of_each": kids,
        }
