"""Pictures/s and picture quality, against stock StableDiffusionPipeline with the same weights.

    python -m benchmarks.sampling                                                # random weights of real size
    python -m benchmarks.sampling --model runs/demo/pipeline --data data/openmoji-demo

Ours is LDMPipeline with the folder's defaults. Stock runs with its defaults (50 steps, float32) and at its best (DPM++
2M, 20 steps, bfloat16), with our guidance scale and noise. Warm: in this process, after a first call. Cold: a fresh
process, from its start to its end. With an upscaler behind the model single large pictures are compared, too: stock's
are upscaled by stock's pipeline at its own defaults. The second table compares the pictures' quality
(benchmarks/sample_quality.py).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from benchmarks.harness import Comparison, Measured, arguments, compare, report
from benchmarks.pipelines import AGAINST, PROMPTS, Arm, clocked, engine_of, ours, random_pipeline, stock, timed
from benchmarks.sample_quality import SampleEvaluator, compare_quality, quality_table
from ldm.inference.defaults import ENGINES
from ldm.pipelines.cascade import UPSCALER_FOLDER

COLD_OURS = """
import sys
from ldm import LDMPipeline
pipeline = LDMPipeline.from_pretrained(sys.argv[1]).to_best_device()
if sys.argv[3] == "openvino":
    pipeline.enable_openvino()
pipeline(["red heart"] * int(sys.argv[2]), seed=0)
"""
COLD_STOCK = """
import sys
import torch
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline
dtype = getattr(torch, sys.argv[5])
pipeline = StableDiffusionPipeline.from_pretrained(sys.argv[1], dtype=dtype)
pipeline.to("cuda" if torch.cuda.is_available() else "cpu")
if sys.argv[6] == "stock best":
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
seed = torch.Generator().manual_seed(0)
pipeline(
    ["red heart"] * int(sys.argv[2]), num_inference_steps=int(sys.argv[3]), guidance_scale=float(sys.argv[4]),
    generator=seed,
)
"""


def cold(arm: Arm, folder: Path, batch: int, threads: int, log: Path) -> Measured:
    """Pictures/s of a fresh process with this arm's settings."""
    words = [str(folder), str(batch)]
    if arm.arguments:
        dtype = str(arm.pipeline.unet.dtype).removeprefix("torch.")
        words += [str(arm.arguments["num_inference_steps"]), str(arm.arguments["guidance_scale"]), dtype, arm.name]
    else:
        words.append(engine_of(arm.pipeline))
    script = COLD_STOCK if arm.arguments else COLD_OURS
    seconds, cpu = timed([sys.executable, "-c", script, *words], threads, log)
    return {"value": batch / seconds, "per_cpu_second": batch / cpu}


def by_cpu(comparison: Comparison) -> Comparison:
    """The same pairs by CPU time, which other programs on the same cores disturb less."""
    by_time = Comparison(f"{comparison.name}, by CPU time", "pictures/CPU s")
    return by_time.with_values(comparison, lambda measured: measured["per_cpu_second"])


def compare_warm(ours: Arm, arm: Arm, batch: int, pairs: int) -> Comparison:
    """Pictures/s of two warm pipelines."""
    for each in (ours, arm):
        each.generate([PROMPTS[0]] * batch)  # all steps: an engine compiles for batches with and without guidance
    comparison = Comparison(f"batch {batch}, warm, {arm.name}", "pictures/s", target=AGAINST[arm.name])
    return compare(comparison, lambda: ours.rate(batch), lambda: arm.rate(batch), pairs)


def compare_upscaled(ours: Arm, arm: Arm, folder: Path, pairs: int) -> Comparison:
    """Large pictures/s of two warm pipelines, one at a time."""
    from diffusers import StableDiffusionUpscalePipeline

    upscaler = StableDiffusionUpscalePipeline.from_pretrained(folder, dtype=arm.pipeline.dtype)
    upscaler = upscaler.to(arm.pipeline.device)
    upscaler.set_progress_bar_config(disable=True)

    def mine() -> Measured:
        return clocked(lambda: ours.generate([PROMPTS[0]], upscale=True))

    def theirs() -> Measured:
        return clocked(lambda: upscaler(PROMPTS[0], arm.generate([PROMPTS[0]])[0]))

    mine()
    upscaler(PROMPTS[0], arm.generate([PROMPTS[0]])[0], num_inference_steps=1)
    return compare(Comparison(f"upscaled, batch 1, warm, {arm.name}", "pictures/s"), mine, theirs, pairs)


def compare_cold(ours: Arm, arm: Arm, batch: int, pairs: int, folder: Path, threads: int, log: Path) -> Comparison:
    """Pictures/s of two fresh processes."""
    comparison = Comparison(f"batch {batch}, cold, {arm.name}", "pictures/s", target=AGAINST[arm.name])

    def measure(each: Arm) -> Callable[[], Measured]:
        return lambda: cold(each, folder, batch, threads, log)

    return compare(comparison, measure(ours), measure(arm), pairs)


def options(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line's options."""
    parser = arguments(__doc__)
    add = parser.add_argument
    add("--model", type=Path, help="a pipeline folder (default: random weights of real size)")
    add("--engine", choices=ENGINES, default="torch", help="the engine of ours (default: torch, as `ldm sample`)")
    add("--data", help="its training data; then retrieval and KID are measured, too")
    add("--split", choices=("train", "heldout"), default="heldout", help="of the prompts (default: heldout)")
    add("--holdout", type=float, default=0.05, help="the run's data.holdout (default: 0.05)")
    add("--net", type=Path, help="folder of the in-domain CLIP (default: nets/<name of the data>)")
    add("--features", nargs="+", default=[], metavar="NET", help="further feature extractors, as in `ldm evaluate`")
    add("--batches", nargs="+", type=int, default=[1, 16], help="(default: 1 16)")
    add("--pictures", type=int, help="number to evaluate (default: 64 with --data, else 16)")
    add("--reference-steps", type=int, default=200, help="of the pictures that errors refer to (default: 200)")
    add(
        "--quick",
        action="store_true",
        help="two pairs, warm single pictures, two pictures evaluated: a check, not a result",
    )
    chosen = parser.parse_args(words)
    if chosen.quick:
        chosen.pairs, chosen.batches, chosen.reference_steps = 2, [1], 100
    chosen.pictures = chosen.pictures or (2 if chosen.quick else 64 if chosen.data else 16)
    return chosen


def main() -> None:
    """Measure and report."""
    chosen = options()
    torch.set_num_threads(chosen.threads)
    out: Path = chosen.out.resolve()
    folder = (chosen.model or random_pipeline(out / "random-pipeline")).resolve()
    mine = ours(folder, engine=chosen.engine)
    scale, device = mine.pipeline.defaults.guidance_scale, mine.pipeline.device
    others = [stock(folder, name, scale, device) for name in AGAINST]
    evaluator, captions = None, [PROMPTS[i % len(PROMPTS)] for i in range(chosen.pictures)]
    if chosen.data:
        chosen.net = chosen.net or Path("nets") / Path(chosen.data).name
        evaluator = SampleEvaluator.of(chosen, mine.pipeline.edge("height"), out / "features")
        captions = list(evaluator.prompts.captions)

    comparisons = []
    for arm in others:
        comparisons += [compare_warm(mine, arm, batch, chosen.pairs) for batch in chosen.batches]
        if (upscaler := folder / UPSCALER_FOLDER).exists():
            comparisons.append(compare_upscaled(mine, arm, upscaler, 2 if chosen.quick else chosen.pairs))
        for batch in [] if chosen.quick else chosen.batches:
            log = out / "sampling.log"
            comparisons.append(compare_cold(mine, arm, batch, chosen.pairs, folder, chosen.threads, log))
    float32 = ours(folder, device), others[0]
    quality = compare_quality([mine, *others], float32, captions, chosen.reference_steps, evaluator, out)
    report(
        "sampling", [one for each in comparisons for one in (each, by_cpu(each))], out, chosen.threads,
        model=str(folder), data=chosen.data, arms={arm.name: arm.describe() for arm in [mine, *others]},
        reference_steps=chosen.reference_steps, evaluated_pictures=len(captions), quality=quality,
    )  # fmt: skip
    print(
        f"\nquality of {len(captions)} pictures of each arm; errors are to pictures of {chosen.reference_steps} steps"
    )
    print(quality_table(quality))


if __name__ == "__main__":
    main()
