"""The pipelines that the sampling benchmarks compare, from one folder.

- ours: `LDMPipeline` with its defaults
- "stock default": stock diffusers as in its documentation: the folder's scheduler, 50 steps, float32
- "stock best": stock diffusers with its documentation's advice for speed: DPM++ 2M, 20 steps, bfloat16 where the
  device is faster in it

All of them get the same captions, guidance scale and initial noise.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import Measured, Target, fresh

DEFAULT_STEPS, BEST_STEPS = 50, 20
PROMPTS = ("red heart", "pizza", "rocket", "cat face", "key", "mushroom", "soccer ball", "umbrella")
AGAINST = {"stock default": Target(8, 30), "stock best": Target(1.5, 6)}  # pictures/s, over stock's


@dataclass
class Arm:
    """A pipeline in memory with fixed arguments.

    Attributes:
        arguments: of each call, besides captions and noise.
        rows: rows of the batches that the U-Net has evaluated since the last reset.
    """

    name: str
    pipeline: Any
    arguments: dict[str, Any] = field(default_factory=dict)
    rows: int = 0

    def __post_init__(self) -> None:
        self.pipeline.set_progress_bar_config(disable=True)
        students = [self.pipeline.student] if getattr(self.pipeline, "has_student", False) else []
        for pipeline in (self.pipeline, *students):
            pipeline.unet.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.rows += len(kwargs["sample"] if "sample" in kwargs else args[0])

    def generate(self, captions: Sequence[str], first_seed: int = 0, **arguments: Any) -> Any:
        """One picture per caption; picture i starts from the noise of `first_seed` + i, the same in every arm."""
        latents = noise(self.pipeline, range(first_seed, first_seed + len(captions)))
        return self.pipeline(list(captions), latents=latents, **{**self.arguments, **arguments}).images

    def pixels(self, captions: Sequence[str], first_seed: int = 0, **arguments: Any) -> Tensor:
        """The same as pixels [N,3,H,W] in [-1,1], not rounded to 8 bits."""
        images = torch.from_numpy(self.generate(captions, first_seed, output_type="np", **arguments))
        return images.permute(0, 3, 1, 2).float() * 2 - 1

    def rate(self, batch: int) -> Measured:
        """Pictures/s of one batch."""
        captions = [PROMPTS[i % len(PROMPTS)] for i in range(batch)]
        self.rows = 0
        measured = clocked(lambda: self.generate(captions), batch)
        return {**measured, "unet_rows_per_picture": self.rows / batch}

    def describe(self) -> dict[str, Any]:
        """The arm's configuration, for the JSON."""
        scheduler = self.pipeline.scheduler
        return {
            "arguments": self.arguments,
            "dtype": str(self.pipeline.unet.dtype),
            "scheduler": [type(scheduler).__name__, {k: v for k, v in scheduler.config.items() if k[0] != "_"}],
            "defaults": vars(self.pipeline.defaults) if hasattr(self.pipeline, "defaults") else None,
            "engine": engine_of(self.pipeline),
        }


def clocked(generate: Callable[[], Any], pictures: int = 1) -> Measured:
    """Pictures/s, and per CPU second, of a call."""
    start, cpu = time.perf_counter(), time.process_time()
    generate()
    cpu, seconds = time.process_time() - cpu, time.perf_counter() - start
    return {"value": pictures / seconds, "per_cpu_second": pictures / cpu}


def timed(command: Sequence[str], threads: int, log: Path) -> tuple[float, float]:
    """Seconds from the start of a fresh process to its end, and its CPU seconds."""
    start, cpu = time.perf_counter(), children_cpu()
    fresh(command, threads, log)
    return time.perf_counter() - start, children_cpu() - cpu


def children_cpu() -> float:
    """CPU seconds of all finished child processes."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def engine_of(pipeline: Any) -> str:
    """The name in ldm.inference.defaults.ENGINES of what computes U-Net and VAE decoder."""
    engine = getattr(pipeline, "engine", None)
    return "torch" if engine is None else str(engine.name)


def ours(folder: Path, plain: torch.device | None = None, engine: str = "torch") -> Arm:
    """LDMPipeline as `ldm sample --engine …` loads it; or in float32 on the device `plain`."""
    from ldm import LDMPipeline
    from ldm.system.devices import best_device, best_dtype

    if plain:
        return Arm("ours in float32", LDMPipeline.from_pretrained(folder).to(plain))
    device = best_device()
    pipeline = LDMPipeline.from_pretrained(folder, dtype=best_dtype(device)).to(device)
    return Arm("ours", pipeline.enable_openvino() if engine == "openvino" else pipeline)


def stock(folder: Path, name: str, guidance_scale: float, device: torch.device) -> Arm:
    """Stock diffusers on the same folder, by a name in AGAINST."""
    from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline

    best = name == "stock best"
    dtype = fast_dtype(device) if best else torch.float32
    pipeline = StableDiffusionPipeline.from_pretrained(folder, dtype=dtype, use_safetensors=True).to(device)
    if best:
        pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    steps = BEST_STEPS if best else DEFAULT_STEPS
    return Arm(name, pipeline, {"num_inference_steps": steps, "guidance_scale": guidance_scale})


def fast_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the device is faster in it, else float32."""
    from ldm.system.devices import best_dtype

    return best_dtype(device)


def noise(pipeline: Any, seeds: Sequence[int]) -> Tensor:
    """x_T of these seeds, sampled in float32: in bfloat16 a generator gives other numbers."""
    config = pipeline.unet.config
    shape = (config.out_channels, config.sample_size, config.sample_size)
    each = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.stack(each).to(pipeline.device, pipeline.unet.dtype)


def random_pipeline(folder: Path) -> Path:
    """A pipeline of real size with random weights, made in `folder` if missing: speed doesn't depend on the weights.

    Pictures of 64 pixels, latents [8,16,16], MiniLM, a U-Net of 23 M parameters.
    """
    from ldm.diffusion.schedule import NoiseSchedule, scheduler_config
    from ldm.models.text_encoder import TextConfig, TextEncoder
    from ldm.models.unet import UNetConfig, build_unet
    from ldm.models.vae import VAEConfig, build_vae
    from ldm.pipelines.text_to_image import LDMPipeline

    if (folder / "model_index.json").exists():
        return folder
    torch.manual_seed(0)
    text = TextEncoder.load(TextConfig("minilm", 24))
    vae = build_vae(VAEConfig((32, 64, 128), layers=2, latent_channels=8)).eval()
    config = UNetConfig((128, 192, 256), (False, True, True), layers=1)
    unet = build_unet(config, latent_shape=(8, 16, 16), context_dim=text.dim).eval()
    schedule = scheduler_config(NoiseSchedule.scaled_linear(), "v")
    LDMPipeline.from_components(vae, text, unet, schedule).save_pretrained(folder)
    return folder
