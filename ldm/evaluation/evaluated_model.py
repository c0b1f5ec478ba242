"""A pipeline as its examiner sees it: a noise predictor with a schedule, an autoencoder, and something that draws."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ldm.diffusion.parameterization import DIFFUSERS_NAMES, Prediction
from ldm.diffusion.schedule import NoiseSchedule
from ldm.evaluation.gallery import Asked
from ldm.evaluation.settings import Settings
from ldm.models.conditioning import Conditioning, denoise
from ldm.models.fingerprint import model_sha256
from ldm.models.text_encoder import TextEncoder
from ldm.models.vae import encode


class Subject:
    """A pipeline to examine.

    Args:
        pipeline: an LDMPipeline.
        folder: where it was loaded from.
    Raises:
        ValueError: if it knows no text, or wants to be told a class or a picture besides.
    """

    def __init__(self, pipeline: Any, folder: Path) -> None:
        if pipeline.tokenizer is None or pipeline.labels or pipeline.condition_channels:
            raise ValueError(f"{folder}: only models that are told a caption, and nothing else, can be evaluated")
        self.pipeline = pipeline
        self.folder = folder
        self.sha256 = model_sha256(pipeline)
        self.text = TextEncoder(pipeline.tokenizer, pipeline.text_encoder)
        self.schedule = NoiseSchedule(pipeline.scheduler.betas.double())
        names: dict[str, Prediction] = {theirs: ours for ours, theirs in DIFFUSERS_NAMES.items()}
        self.prediction = names[pipeline.scheduler.config.prediction_type]
        self.size: int = pipeline.edge("height")
        self.null_context = self.text.encode([""])
        pipeline.set_progress_bar_config(disable=True)  # there is one over all pictures

    @property
    def device(self) -> torch.device:
        return torch.device(self.pipeline.device)

    def network(self, x_t: Tensor, t: Tensor, told: Conditioning) -> Tensor:
        """The U-Net's answer."""
        return denoise(self.pipeline.unet, x_t, t, told)

    @torch.no_grad()
    def latents(self, pixels: Tensor) -> Tensor:
        """pixels [B,3,H,W] => the mean of their latents."""
        return encode(self.pipeline.vae, pixels.to(self.device)).mean

    def evaluations(self, settings: Settings) -> int:
        """How often the U-Net is asked for one picture: twice at a guided step, once at any other."""
        stock = self.pipeline.scheduler
        scheduler = type(stock).from_config(stock.config)
        scheduler.set_timesteps(settings.steps)
        low, high = (settings.guidance_interval[i] * self.schedule.T for i in (0, 1))
        guided = [settings.guidance_scale > 1 and low <= float(t) < high for t in scheduler.timesteps]
        return len(guided) + sum(guided)

    def draw(self, captions: Sequence[str], first: int, settings: Settings) -> list[Image.Image]:
        """One picture for each caption; captions too long for the encoder are cut, as in training."""
        context = self.text.encode(captions)
        drawn = self.pipeline(
            prompt_embeds=context,
            negative_prompt_embeds=self.null_context.expand_as(context),
            num_inference_steps=settings.steps,
            guidance_scale=settings.guidance_scale,
            guidance_interval=settings.guidance_interval,
            seed=[settings.seed + first + i for i in range(len(captions))],
        )
        pictures: list[Image.Image] = drawn.images
        return pictures

    def draw_all(self, asked: Asked, settings: Settings, out: Path, batch_size: int) -> list[Path]:
        """Draw every caption into out/pictures/, or find there what the same request has drawn before.

        A picture that is there is whole, so an interrupted evaluation goes on where it was.
        """
        request = {"model": self.sha256, "settings": asdict(settings), "captions": list(asked.captions)}
        key = hashlib.sha256(json.dumps(request).encode()).hexdigest()[:12]
        folder = out / "pictures" / f"{asked.name}-{key}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "request.json").write_text(json.dumps(request, indent=2, ensure_ascii=False) + "\n", "utf-8")
        paths = [folder / f"{i:05d}.png" for i in range(len(asked))]
        missing = [i for i, path in enumerate(paths) if not path.exists()]
        doing = f"drawing {asked.name} captions, {settings.steps} steps, guidance {settings.guidance_scale:g}"
        with tqdm(total=len(paths), initial=len(paths) - len(missing), desc=doing, unit="picture") as bar:
            for batch in consecutive(missing, batch_size):
                drawn = self.draw([asked.captions[i] for i in batch], batch[0], settings)
                for i, picture in zip(batch, drawn, strict=True):
                    unfinished = paths[i].with_suffix(".new")
                    picture.save(unfinished, format="PNG")
                    unfinished.rename(paths[i])
                bar.update(len(batch))
        return paths


def consecutive(numbers: Sequence[int], most: int) -> list[list[int]]:
    """Runs of consecutive numbers, none longer than `most`."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and len(runs[-1]) < most and runs[-1][-1] + 1 == number:
            runs[-1].append(number)
        else:
            runs.append([number])
    return runs
