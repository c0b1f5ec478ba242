"""Seconds of a fresh process to import, to print its help, and to its first picture, against stock diffusers.

    python -m benchmarks.startup                                   # a pipeline of real size with random weights
    python -m benchmarks.startup --model runs/demo/pipeline

Every measurement is a fresh process, from its start to its end, offline, with its files in the system's cache: both
arms have run once before. Stock's first picture is the script of its documentation, which saves a PNG, at its default
of 50 steps and at our number of steps. With an upscaler behind the model the first large picture is measured, too:
stock's is upscaled by stock's pipeline at its own defaults. `--explain` lists the slowest imports of our process.
"""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.harness import Comparison, Measured, Target, arguments, compare, report
from benchmarks.pipelines import DEFAULT_STEPS, PROMPTS, random_pipeline, timed
from ldm.inference.defaults import Defaults
from ldm.pipelines.cascade import UPSCALER_FOLDER

FIRST_PICTURE = Target(0.8, 0.3)  # seconds, over stock's
LDM, DIFFUSERS = (str(Path(sys.executable).with_name(name)) for name in ("ldm", "diffusers-cli"))
STOCK = """
import sys
import torch
from diffusers import StableDiffusionPipeline
pipeline = StableDiffusionPipeline.from_pretrained(sys.argv[1])
pipeline.to("cuda" if torch.cuda.is_available() else "cpu")
arguments = dict(num_inference_steps=int(sys.argv[4]), guidance_scale=float(sys.argv[5]))
picture = pipeline(sys.argv[2], generator=torch.Generator().manual_seed(7), **arguments).images[0]
if len(sys.argv) > 6:
    from diffusers import StableDiffusionUpscalePipeline
    upscaler = StableDiffusionUpscalePipeline.from_pretrained(sys.argv[6]).to(pipeline.device)
    picture = upscaler(sys.argv[2], picture, generator=torch.Generator().manual_seed(7)).images[0]
picture.save(sys.argv[3])
"""


def python(code: str) -> list[str]:
    """The command of a fresh interpreter that runs this code."""
    return [sys.executable, "-c", code]


def process(command: Sequence[str], threads: int, log: Path) -> Callable[[], Measured]:
    """An arm: seconds of a fresh process that runs this command."""

    def arm() -> Measured:
        seconds, cpu = timed(command, threads, log)
        return {"value": seconds, "cpu_seconds": cpu}

    return arm


def commands(folder: Path, out: Path) -> dict[str, tuple[list[str], list[str], Target | None]]:
    """By comparison: our command, stock's command, and the target of the ratio of seconds."""
    defaults = Defaults.load(folder)
    ours = [LDM, "sample", str(folder), PROMPTS[0], "--out", str(out / "first-ours.png"), "--seed", "7"]
    stock = [*python(STOCK), str(folder), PROMPTS[0], str(out / "first-stock.png")]
    scale = str(defaults.guidance_scale)
    steps = defaults.num_inference_steps
    pipelines = python("from ldm import LDMPipeline"), python("from diffusers import StableDiffusionPipeline")
    upscaler, large = folder / UPSCALER_FOLDER, {}
    if upscaler.exists():
        first = [*stock, str(DEFAULT_STEPS), scale, str(upscaler)]
        large = {"first upscaled picture, stock at its defaults": ([*ours, "--upscale"], first, None)}
    return {
        "import the package": (python("import ldm"), python("import diffusers"), None),
        "import the pipeline": (*pipelines, None),
        "help": ([LDM, "--help"], [DIFFUSERS, "--help"], None),
        f"first picture, stock in {DEFAULT_STEPS} steps": (ours, [*stock, str(DEFAULT_STEPS), scale], FIRST_PICTURE),
        f"first picture, stock in {steps} steps": (ours, [*stock, str(steps), scale], None),
        **large,
    }


def warm_up(folder: Path, out: Path, threads: int) -> None:
    """Generate once with each, so that their files are in the system's cache."""
    for name, (ours, stock, _) in commands(folder, out).items():
        if name.startswith("first"):
            for command in (ours, stock):
                timed(command, threads, out / "startup.log")


def slowest_imports(command: Sequence[str], most: int = 12) -> list[str]:
    """The packages with the longest import times in a Python command, without their own imports of others."""
    output = subprocess.run([sys.executable, "-X", "importtime", *command], capture_output=True, text=True).stderr
    spent: Counter[str] = Counter()
    for own, _, module in (line.split("|") for line in output.splitlines() if line.count("|") == 2):
        microseconds = own.removeprefix("import time:").strip()
        if microseconds.isdigit():  # the first line names the columns
            spent[module.strip().split(".")[0]] += int(microseconds)
    return [f"{own / 1e6:6.2f} s  {package}" for package, own in spent.most_common(most)]


def main() -> None:
    """Measure and report."""
    parser = arguments(__doc__)
    parser.add_argument("--model", type=Path, help="a pipeline folder (default: random weights of real size)")
    parser.add_argument(
        "--explain", action="store_true", help="list the packages that our first picture spends most time importing"
    )
    parser.add_argument("--quick", action="store_true", help="two pairs, first picture only")
    chosen = parser.parse_args()
    out = chosen.out.resolve()
    folder = (chosen.model or random_pipeline(out / "random-pipeline")).resolve()
    warm_up(folder, out, chosen.threads)
    comparisons = []
    for name, (ours, stock, target) in commands(folder, out).items():
        if chosen.quick and target is None:
            continue
        mine, theirs = (process(command, chosen.threads, out / "startup.log") for command in (ours, stock))
        pairs = 2 if chosen.quick else chosen.pairs
        found = compare(Comparison(f"{name} (lower is better)", "s", target=target), mine, theirs, pairs)
        cpu = Comparison(f"{name} (lower is better), by CPU time", "CPU s")
        comparisons += [found, cpu.with_values(found, lambda measured: measured["cpu_seconds"])]
    report("startup", comparisons, out, chosen.threads, model=str(folder), defaults=vars(Defaults.load(folder)))
    if chosen.explain:
        ours = commands(folder, out)[f"first picture, stock in {DEFAULT_STEPS} steps"][0]
        print("our first picture: packages by the import time of their modules", *slowest_imports(ours), sep="\n")


if __name__ == "__main__":
    main()
