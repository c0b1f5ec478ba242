"""Model FLOPs utilization of a training step: its FLOP/s against the best matrix product of the same process.

    python -m benchmarks.mfu

The FLOPs are those of the U-Net's matrix products and convolutions, forward and backward, counted on `meta`. The time
is that of the whole step, with noise, loss, clipping, AdamW and the moving average, at the precision that a run would
choose here. The reference is the fastest product of several sizes, in bfloat16 or float32. Both are measured in one
process, in the order A B B A.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import torch
from accelerate.state import AcceleratorState
from torch import Tensor

from benchmarks.counters import latent_shape, unet_flops
from benchmarks.harness import Comparison, Measured, Target, arguments, compare, report
from benchmarks.settings import SETTINGS, Setting
from ldm.models.conditioning import Conditioning
from ldm.models.unet import choose_attention
from ldm.training.config import Config, LoopConfig
from ldm.training.distributed import build_accelerator
from ldm.training.objective import DiffusionConfig
from ldm.training.samples import Batch
from ldm.training.tasks.diffusion import Diffusion
from ldm.training.trainer import Trainer

TARGET = Target(0.15, 0.40)
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
SHAPES = ((1024, 1024, 1024), (2048, 2048, 2048), (4096, 1024, 4096))  # (rows, inner, columns)


def best_of(work: Callable[[], object], times: int) -> float:
    """The shortest of `times` runs, in seconds."""
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def best_product(times: int) -> Measured:
    """{"value": GFLOP/s of the fastest product, and of each dtype and shape}."""
    rates = {}
    for name, dtype in DTYPES.items():
        for m, k, n in SHAPES:
            product = partial(torch.mm, torch.ones(m, k, dtype=dtype), torch.ones(k, n, dtype=dtype))
            product()
            rates[f"{name} {m}x{k}x{n}"] = 2 * m * k * n / best_of(product, times) / 1e9
    return {"value": max(rates.values()), "products": rates}


def build_step(setting: Setting, batch_size: int, threads: int) -> Callable[[], tuple[Tensor, Tensor]]:
    """One training step on random latents and contexts, with the trainer of train_ldm.py."""
    diffusion = DiffusionConfig(prediction="v", weighting="min_snr")
    loop = LoopConfig(batch_size=batch_size, threads=threads)
    config = Config(unet=setting.unet_config, diffusion=diffusion, loop=loop)
    accelerator = build_accelerator(loop)
    shape = latent_shape(setting)
    torch.manual_seed(0)
    unet = setting.unet(shape)
    choose_attention(unet, accelerator.device)
    task = Diffusion(config, accelerator)
    task.train(unet)
    trainer = Trainer(task)
    batch = Batch(
        x0=torch.randn(batch_size, *shape),
        conditioning=Conditioning(torch.randn(batch_size, setting.tokens, setting.width)),
        u=torch.rand(batch_size, dtype=torch.float64),
        eps=torch.randn(batch_size, *shape),
    )
    return lambda: trainer.step(0, [batch])


def main() -> None:
    """Measure every setting and report."""
    parser = arguments(__doc__)
    parser.add_argument("--settings", default="C", help="which of A, B and C")
    parser.add_argument("--batch-size", type=int, default=16, help="(default: 16)")
    parser.add_argument("--steps", type=int, default=3, help="steps of each measurement; the fastest counts")
    chosen = parser.parse_args()
    comparisons, facts = [], {}
    for name in chosen.settings:
        step = build_step(SETTINGS[name], chosen.batch_size, chosen.threads)
        work = unet_flops(SETTINGS[name]) * chosen.batch_size
        precision = AcceleratorState().mixed_precision
        facts[name] = {"flops_per_step": work, "batch_size": chosen.batch_size, "precision": precision}
        step()  # the first step allocates memory

        def ours(step: Callable[[], object] = step, work: int = work) -> Measured:
            return {"value": work / best_of(step, chosen.steps) / 1e9}

        comparison = Comparison(f"{name} MFU of a training step", "GFLOP/s", target=TARGET)
        comparisons.append(compare(comparison, ours, lambda: best_product(chosen.steps), chosen.pairs))
    report("mfu", comparisons, chosen.out, chosen.threads, settings=facts)


if __name__ == "__main__":
    main()
