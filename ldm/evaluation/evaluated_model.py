"""The model under evaluation: a noise predictor with a schedule, an autoencoder, and a generator of pictures."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ldm.diffusion.guidance import interval_scale
from ldm.diffusion.schedule import prediction_from_config, schedule_from_config
from ldm.evaluation.evaluation_set import PromptSet
from ldm.inference.defaults import EVERYWHERE
from ldm.models.conditioning import Conditioning, denoise, scale_embedding
from ldm.models.fingerprint import model_sha256
from ldm.models.text_encoder import TextEncoder
from ldm.models.vae import encode

WARM = 16
COLD = """
import sys
from ldm import LDMPipeline
pipeline = LDMPipeline.from_pretrained(sys.argv[1]).to_best_device()
pipeline(sys.argv[2], num_inference_steps=int(sys.argv[3]), guidance_scale=float(sys.argv[4]), seed=0)
"""


@dataclass(frozen=True)
class SamplingSettings:
    """Sampling steps, guidance, and the seed of the first picture; picture i has seed + i."""

    steps: int
    guidance_scale: float
    seed: int = 0
    guidance_interval: tuple[float, float] = EVERYWHERE


class EvaluatedModel:
    """A pipeline to evaluate.

    Args:
        pipeline: an LDMPipeline.
        folder: where it was loaded from.
    Raises:
        ValueError: if it takes no text, or a class or a picture besides.
    """

    def __init__(self, pipeline: Any, folder: Path) -> None:
        if pipeline.tokenizer is None or pipeline.labels or pipeline.numbers or pipeline.extra_channels:
            raise ValueError(f"{folder}: only models that are conditioned on text, and nothing else, can be evaluated")
        self.pipeline = pipeline
        self.folder = folder
        self.sha256 = model_sha256(pipeline)
        self.text = TextEncoder(pipeline.tokenizer, pipeline.text_encoder)
        self.schedule = schedule_from_config(pipeline.scheduler.config)
        self.prediction = prediction_from_config(pipeline.scheduler.config)
        self.size: int = pipeline.edge("height")
        self.null_context = self.text.encode([""])
        pipeline.set_progress_bar_config(disable=True)  # `generate_all` has one for all pictures

    @property
    def device(self) -> torch.device:
        return torch.device(self.pipeline.device)

    def network(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """The U-Net's prediction; a distilled one's at guidance scale 1."""
        stock: dict[str, Tensor] = {}
        dim = self.pipeline.unet.config.time_cond_proj_dim
        if dim is not None:
            stock["timestep_cond"] = scale_embedding(torch.ones(len(x_t)), dim).to(x_t)
        return denoise(self.pipeline.unet, x_t, t, conditioning, **stock)

    @torch.no_grad()
    def latents(self, pixels: Tensor) -> Tensor:
        """pixels [B,3,H,W] => the mean of their latents."""
        return encode(self.pipeline.vae, pixels.to(self.device)).mean

    def unet_evaluations(self, settings: SamplingSettings) -> int:
        """U-Net evaluations per picture: two at a guided step, one at any other and at all of a distilled model's."""
        stock = self.pipeline.scheduler
        scheduler = type(stock).from_config(stock.config)
        scheduler.set_timesteps(settings.steps)
        distilled = self.pipeline.unet.config.time_cond_proj_dim is not None
        T, scale, interval = self.schedule.T, settings.guidance_scale, settings.guidance_interval
        scale = 1.0 if distilled else scale
        guided = [interval_scale(scale, t, T, interval) > 1 for t in scheduler.timesteps.tolist()]
        return len(guided) + sum(guided)

    def generate(self, captions: Sequence[str], first: int, settings: SamplingSettings) -> list[Image.Image]:
        """One picture for each caption; captions too long for the encoder are truncated, as in training.

        Args:
            first: number of the first picture, which decides the seeds.
        """
        context = self.text.encode(captions)
        output = self.pipeline(
            prompt_embeds=context,
            negative_prompt_embeds=self.null_context.expand_as(context),
            num_inference_steps=settings.steps,
            guidance_scale=settings.guidance_scale,
            guidance_interval=settings.guidance_interval,
            seed=[settings.seed + first + i for i in range(len(captions))],
        )
        pictures: list[Image.Image] = output.images
        return pictures

    def generate_all(self, prompts: PromptSet, settings: SamplingSettings, out: Path, batch_size: int) -> list[Path]:
        """Generate a picture for every prompt into out/pictures/; pictures of an earlier identical request are reused.

        Files are written whole or not at all, so an interrupted evaluation continues where it stopped.
        """
        request = {"model": self.sha256, "settings": asdict(settings), "captions": list(prompts.captions)}
        key = hashlib.sha256(json.dumps(request).encode()).hexdigest()[:12]
        folder = out / "pictures" / f"{prompts.name}-{key}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "request.json").write_text(json.dumps(request, indent=2, ensure_ascii=False) + "\n", "utf-8")
        paths = [folder / f"{i:05d}.png" for i in range(len(prompts))]
        missing = [i for i, path in enumerate(paths) if not path.exists()]
        doing = f"generating {prompts.name} prompts, {settings.steps} steps, guidance {settings.guidance_scale:g}"
        with tqdm(total=len(paths), initial=len(paths) - len(missing), desc=doing, unit="picture") as bar:
            for batch in consecutive(missing, batch_size):
                pictures = self.generate([prompts.captions[i] for i in batch], batch[0], settings)
                for i, picture in zip(batch, pictures, strict=True):
                    unfinished = paths[i].with_suffix(".new")
                    picture.save(unfinished, format="PNG")
                    unfinished.rename(paths[i])
                bar.update(len(batch))
        return paths


def consecutive(numbers: Sequence[int], most: int) -> list[list[int]]:
    """Ascending numbers => runs of consecutive ones, none longer than `most`."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and len(runs[-1]) < most and runs[-1][-1] + 1 == number:
            runs[-1].append(number)
        else:
            runs.append([number])
    return runs


def time_generation(model: EvaluatedModel, caption: str, settings: SamplingSettings) -> dict[str, Any]:
    """Seconds from the start of a fresh process to its first picture, and for 16 pictures in this warm process.

    Each is measured once, beside whatever else the machine does.
    """
    words = [str(model.folder), caption, str(settings.steps), str(settings.guidance_scale)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", COLD, *words], check=True, env=environment, capture_output=True)
    cold = time.perf_counter() - started
    model.generate([caption], 0, settings)  # warm up
    started = time.perf_counter()
    model.generate([caption] * WARM, 0, settings)
    warm = time.perf_counter() - started
    return {
        "first_picture_cold_seconds": round(cold, 2),
        "warm_pictures": WARM,
        "warm_seconds": round(warm, 2),
        "steps": settings.steps,
        "guidance_scale": settings.guidance_scale,
    }
