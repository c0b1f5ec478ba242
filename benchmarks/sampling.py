"""Pictures/s, and what they are worth, beside stock StableDiffusionPipeline on the same weights.

    python -m benchmarks.sampling                                                # random weights of real size
    python -m benchmarks.sampling --model runs/demo/pipeline --data data/openmoji-demo

Ours is LDMPipeline with its defaults, whatever the folder says they are. Stock draws at its defaults (50 steps,
float32) and at its best (DPM++ 2M, 20 steps, bfloat16), at our guidance scale, from our noise. Warm: in this process,
after a first call. Cold: a fresh process, from its start to its end. A speed is worth what its pictures are worth, so
the second table says what each arm's are (benchmarks/quality.py).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from benchmarks.drawing import AGAINST, PROMPTS, Arm, engine_of, ours, random_pipeline, stock, timed
from benchmarks.harness import Comparison, Measured, arguments, compare, report
from benchmarks.quality import Judge, compare_quality, quality_table
from ldm.inference.defaults import ENGINES

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
    """Pictures/s of a fresh process that draws as this arm does."""
    words = [str(folder), str(batch)]
    if arm.told:
        dtype = str(arm.pipeline.unet.dtype).removeprefix("torch.")
        words += [str(arm.told["num_inference_steps"]), str(arm.told["guidance_scale"]), dtype, arm.name]
    else:
        words.append(engine_of(arm.pipeline))
    script = COLD_STOCK if arm.told else COLD_OURS
    seconds, cpu = timed([sys.executable, "-c", script, *words], threads, log)
    return {"value": batch / seconds, "per_cpu_second": batch / cpu}


def by_cpu(comparison: Comparison) -> Comparison:
    """The same pairs by CPU time, which other people's work on the same cores disturbs less."""
    seen = Comparison(f"{comparison.name}, by CPU time", "pictures/CPU s")
    return seen.with_values(comparison, lambda told: told["per_cpu_second"])


def compare_warm(ours: Arm, arm: Arm, batch: int, pairs: int) -> Comparison:
    """Pictures/s of two pipelines that have drawn before."""
    for each in (ours, arm):
        each.draw([PROMPTS[0]] * batch)  # every step: an engine compiles for the batches with guidance and without
    comparison = Comparison(f"batch {batch}, warm, {arm.name}", "pictures/s", target=AGAINST[arm.name])
    return compare(comparison, lambda: ours.rate(batch), lambda: arm.rate(batch), pairs)


def compare_cold(ours: Arm, arm: Arm, batch: int, pairs: int, folder: Path, threads: int, log: Path) -> Comparison:
    """Pictures/s of two fresh processes."""
    comparison = Comparison(f"batch {batch}, cold, {arm.name}", "pictures/s", target=AGAINST[arm.name])

    def side(each: Arm) -> Callable[[], Measured]:
        return lambda: cold(each, folder, batch, threads, log)

    return compare(comparison, side(ours), side(arm), pairs)


def options(words: Sequence[str] | None = None) -> argparse.Namespace:
    """What was typed."""
    parser = arguments(__doc__)
    add = parser.add_argument
    add("--model", type=Path, help="a pipeline folder (default: random weights of real size)")
    add("--engine", choices=ENGINES, default="torch", help="what computes ours (default: torch, as `ldm sample`)")
    add("--data", help="what it was trained on; then retrieval and KID are told beside the speed")
    add("--split", choices=("train", "heldout"), default="heldout", help="whose captions are judged (default: heldout)")
    add("--holdout", type=float, default=0.05, help="the run's data.holdout (default: 0.05)")
    add("--net", type=Path, help="the data set's own judge (default: nets/<name of the data>)")
    add("--features", nargs="+", default=[], metavar="NET", help="other judges, as `ldm evaluate` takes them")
    add("--batches", nargs="+", type=int, default=[1, 16], help="(default: 1 16)")
    add("--pictures", type=int, help="to judge (default: 64 with --data, else 16)")
    add("--reference-steps", type=int, default=200, help="of the pictures that errors are told from (default: 200)")
    add("--quick", action="store_true", help="two pairs, warm single pictures, two pictures judged: a look, no figure")
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
    judge, captions = None, [PROMPTS[i % len(PROMPTS)] for i in range(chosen.pictures)]
    if chosen.data:
        chosen.net = chosen.net or Path("nets") / Path(chosen.data).name
        judge = Judge.of(chosen, mine.pipeline.edge("height"), out / "features")
        captions = list(judge.asked.captions)

    comparisons = []
    for arm in others:
        comparisons += [compare_warm(mine, arm, batch, chosen.pairs) for batch in chosen.batches]
        for batch in [] if chosen.quick else chosen.batches:
            log = out / "sampling.log"
            comparisons.append(compare_cold(mine, arm, batch, chosen.pairs, folder, chosen.threads, log))
    float32 = ours(folder, device), others[0]
    worth = compare_quality([mine, *others], float32, captions, chosen.reference_steps, judge, out)
    report(
        "sampling", [seen for each in comparisons for seen in (each, by_cpu(each))], out, chosen.threads,
        model=str(folder), data=chosen.data, arms={arm.name: arm.describe() for arm in [mine, *others]},
        reference_steps=chosen.reference_steps, judged_pictures=len(captions), quality=worth,
    )  # fmt: skip
    print(f"\nwhat {len(captions)} pictures of each are worth; errors are told from {chosen.reference_steps} steps")
    print(quality_table(worth))


if __name__ == "__main__":
    main()
