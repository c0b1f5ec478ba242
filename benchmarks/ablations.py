"""Ablations of a training step: the trainer's own step against the same step with one change.

    python -m benchmarks.ablations --unet base256 --batch-size 64

The step is that of train_ldm.py with its defaults for this machine's device (a GPU if there is one, unless
ACCELERATE_USE_CPU=true), on random latents and contexts. It includes noise, loss, clipping, AdamW and the moving
average. The ratio is the speed of the changed step over that of the default: below 1 the default is better. --unet is
A, B or C (the benchmarks' settings) or the name of a file in configs/.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from diffusers.training_utils import EMAModel

from benchmarks.counters import latent_shape
from benchmarks.harness import ROOT, Comparison, Measured, arguments, compare, report
from benchmarks.settings import SETTINGS, SIZE
from ldm.models.conditioning import Conditioning
from ldm.models.unet import UNetConfig, build_unet, choose_attention
from ldm.training.config import Config, LoopConfig
from ldm.training.distributed import build_accelerator
from ldm.training.objective import DiffusionConfig
from ldm.training.samples import Batch
from ldm.training.tasks.diffusion import Diffusion
from ldm.training.trainer import Trainer

#: Sizes of pretrained encoders from the Hub, for configs that name them: f8 of 4 channels, CLIP-L's width and tokens.
HUB_LATENTS, HUB_DIM, HUB_TOKENS = (8, 4), 1024, 77


@dataclass(frozen=True)
class Shape:
    """The U-Net and the shapes of its inputs."""

    unet: UNetConfig
    latents: tuple[int, int, int]
    tokens: int
    width: int


def shape_of(name: str) -> Shape:
    """Of a setting, or of configs/NAME.yaml with a VAE and a text encoder of the Hub's sizes."""
    if name in SETTINGS:
        setting = SETTINGS[name]
        return Shape(setting.unet_config, latent_shape(setting), setting.tokens, setting.width)
    config = yaml.safe_load((ROOT / "configs" / f"{name}.yaml").read_text("utf-8"))
    unet: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in config["unet"].items()
    }
    size = int(config["data"].get("size", SIZE)) // HUB_LATENTS[0]
    return Shape(UNetConfig(**unet), (HUB_LATENTS[1], size, size), HUB_TOKENS, HUB_DIM)


@dataclass(frozen=True)
class Plan:
    """How a step is built.

    Attributes:
        config: of the training.
        unet, training: change these objects before the first step.
        around: runs the steps.
    """

    config: Config
    device: torch.device
    unet: Callable[[Any], Any] = lambda unet: unet
    task: Callable[[Diffusion], None] = lambda task: None
    around: Callable[[Callable[[], None]], None] = lambda step: step()


def compiled(plan: Plan) -> Plan:
    """loop.compile."""
    return replace(plan, config=replace(plan.config, loop=replace(plan.config.loop, compile=True)))


def channels_last(plan: Plan) -> Plan:
    """Weights in channels-last memory format."""
    return replace(plan, unet=lambda unet: unet.to(memory_format=torch.channels_last))


def checkpointed(plan: Plan) -> Plan:
    """loop.gradient_checkpointing."""
    return replace(plan, config=replace(plan.config, loop=replace(plan.config.loop, gradient_checkpointing=True)))


def other_attention(plan: Plan) -> Plan:
    """The attention kernel of the other kind of device: bmm + softmax on a GPU, SDPA on a CPU."""
    other = torch.device("cuda" if plan.device.type == "cpu" else "cpu")

    def change(unet: Any) -> Any:
        choose_attention(unet, other)
        return unet

    return replace(plan, unet=change)


def stock_average(plan: Plan) -> Plan:
    """The moving average of diffusers."""

    def change(task: Diffusion) -> None:
        task.unet.ema = EMAModel(task.unet.module.parameters(), decay=plan.config.optim.ema_decay, foreach=True)

    return replace(plan, task=change)


def slow_adamw(plan: Plan) -> Plan:
    """AdamW without its fused kernel, and so clipping in a pass of its own."""

    def change(task: Diffusion) -> None:
        optim = plan.config.optim
        plain = torch.optim.AdamW(
            task.unet.module.parameters(), lr=optim.lr, betas=optim.betas, weight_decay=optim.weight_decay, fused=False
        )
        task.unet.optimizer = task.accelerator.prepare(plain)

    return replace(plan, task=change)


def tf32(plan: Plan) -> Plan:
    """TF32 for the remaining float32 products."""

    def around(step: Callable[[], None]) -> None:
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high")
        try:
            step()
        finally:
            torch.set_float32_matmul_precision(before)

    return replace(plan, around=around)


CHANGES: dict[str, Callable[[Plan], Plan]] = {
    "channels last": channels_last,
    "compile": compiled,
    "other attention kernel": other_attention,
    "AdamW not fused": slow_adamw,
    "diffusers' average": stock_average,
    "TF32": tf32,
    "gradient checkpointing": checkpointed,
}


def build(plan: Plan, accelerator: Accelerator, shape: Shape, batch_size: int) -> Callable[[int], Measured]:
    """A function: number of steps => {"value": pictures/s} of the planned step."""
    device = plan.device
    torch.manual_seed(0)
    unet = build_unet(shape.unet, latent_shape=shape.latents, context_dim=shape.width)
    choose_attention(unet, device)
    task = Diffusion(plan.config, accelerator)
    task.train(plan.unet(unet))
    plan.task(task)
    trainer = Trainer(task)
    batch = Batch(
        x0=torch.randn(batch_size, *shape.latents, device=device),
        conditioning=Conditioning(torch.randn(batch_size, shape.tokens, shape.width, device=device)),
        u=torch.rand(batch_size, dtype=torch.float64),
        eps=torch.randn(batch_size, *shape.latents, device=device),
    )

    def measure(steps: int) -> Measured:
        def run() -> None:
            for _ in range(steps):
                trainer.step(0, [batch])
            if device.type != "cpu":
                torch.accelerator.synchronize()

        start = time.perf_counter()
        plan.around(run)
        return {"value": steps * batch_size / (time.perf_counter() - start)}

    return measure


def main() -> None:
    """Measure every change and report."""
    parser = arguments(__doc__)
    add = parser.add_argument
    add("--unet", default="C", help="A, B or C, or the name of a config such as base256")
    add("--batch-size", type=int, default=16, help="(default: 16)")
    add("--steps", type=int, default=3, help="of each measurement (default: 3)")
    add("--precision", default="auto", choices=("auto", "fp32", "bf16"), help="loop.precision of all steps")
    add(
        "--changes",
        nargs="+",
        choices=CHANGES,
        default=list(CHANGES),
        metavar="CHANGE",
        help=f"of {', '.join(CHANGES)}",
    )
    chosen = parser.parse_args()
    loop = LoopConfig(batch_size=chosen.batch_size, threads=chosen.threads, precision=chosen.precision)
    accelerator = build_accelerator(loop)
    config = Config(diffusion=DiffusionConfig(prediction="v", weighting="min_snr"), loop=loop)
    plan, shape = Plan(config, accelerator.device), shape_of(chosen.unet)
    default = build(plan, accelerator, shape, chosen.batch_size)
    default(2)  # the first steps allocate memory
    comparisons = []
    for name in chosen.changes:
        changed = build(CHANGES[name](plan), accelerator, shape, chosen.batch_size)
        changed(2)
        comparison = Comparison(f"{chosen.unet}, {name}", "pictures/s")
        ours, peer = (partial(measure, chosen.steps) for measure in (changed, default))
        comparisons.append(compare(comparison, ours, peer, chosen.pairs))
    facts = {"batch_size": chosen.batch_size, "precision": accelerator.mixed_precision, "steps": chosen.steps}
    report("ablations", comparisons, chosen.out, chosen.threads, accelerator.device, **facts)


if __name__ == "__main__":
    main()
