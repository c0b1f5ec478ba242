"""Does a model that is conditioned on numbers obey them? Circles of a size, bars of an angle, in closed form.

    python -m benchmarks.numbers --out runs/numbers

Renders pictures of 16 x 16 pixels whose `size` is a circle's radius, or whose `angle` is a bar's, trains a small model
on each without text, generates at numbers in between, and measures what came out: the radius from the colored area, the
angle from its second moments. Reported are Spearman's rank correlation and the mean error.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from ldm import LDMPipeline
from ldm.cli.main import main as ldm

EDGE, FINE = 16, 8  # pixels of a picture, and how much finer it is rendered
LEAST, MOST = {"size": 2.0, "angle": 0.0}, {"size": 7.0, "angle": 90.0}


def circle(size: float) -> Image.Image:
    """A circle of this radius in pixels."""
    picture = Image.new("L", (EDGE * FINE,) * 2, 255)
    middle, radius = EDGE * FINE / 2, size * FINE
    ImageDraw.Draw(picture).ellipse([middle - radius, middle - radius, middle + radius, middle + radius], fill=0)
    return picture.resize((EDGE, EDGE), Image.Resampling.BOX)


def bar(angle: float) -> Image.Image:
    """A bar through the middle at this angle, in degrees from the horizontal."""
    picture = Image.new("L", (EDGE * FINE,) * 2, 255)
    middle, x, y = EDGE * FINE / 2, math.cos(math.radians(angle)), math.sin(math.radians(angle))
    ends = [(middle - side * 6.5 * FINE * x, middle + side * 6.5 * FINE * y) for side in (1, -1)]
    ImageDraw.Draw(picture).line(ends, fill=0, width=3 * FINE)
    return picture.resize((EDGE, EDGE), Image.Resampling.BOX)


def radius_of(ink: npt.NDArray[np.float64]) -> float:
    """The radius of a disk of as much ink, a share of each pixel [H,W]."""
    return math.sqrt(float(ink.sum()) / math.pi)


def angle_of(ink: npt.NDArray[np.float64]) -> float:
    """The angle of the axis of most variance of the ink [H,W], in degrees from 0 to 180."""
    y, x = np.mgrid[: len(ink), : len(ink)]
    weight = ink / ink.sum()
    x, y = x - (weight * x).sum(), (weight * y).sum() - y
    covariance, difference = (weight * x * y).sum(), (weight * (x**2 - y**2)).sum()
    return math.degrees(math.atan2(2 * covariance, difference) / 2) % 180


KINDS: dict[str, tuple[Callable[[float], Image.Image], Callable[[npt.NDArray[np.float64]], float]]] = {
    "size": (circle, radius_of),
    "angle": (bar, angle_of),
}


def examine(kind: str, out: Path, steps: int, pictures: int) -> str:
    """Render, train, generate and measure one kind; returns a line."""
    render, measure = KINDS[kind]
    data, rng = out / kind, np.random.default_rng(0)
    data.mkdir(parents=True, exist_ok=True)
    rows = []
    for i, value in enumerate(rng.uniform(LEAST[kind], MOST[kind], pictures)):
        render(value).save(data / f"{i}.png")
        rows.append({"file_name": f"{i}.png", kind: float(value)})
    (data / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [
        f"data.source={data}", f"run={out / f'run-{kind}'}", "data.caption_columns=[]", f"data.number_columns=[{kind}]",
        "text.encoder=null", f"data.size={EDGE}", "vae_model.channels=[32,32]", "vae_model.latent_channels=4",
        "vae_training.steps=300", "vae_training.batch_size=16", "vae_training.lr=0.002",
        "unet.channels=[32,64]", "unet.attention=[false,false]", "unet.layers=1", "optim.lr=0.002", "optim.warmup=20",
        f"loop.steps={steps}", "loop.batch_size=32", "loop.precision=fp32", "loop.sample_every=0",
        f"loop.evaluate_every={steps}", f"loop.checkpoint_every={steps}", "diffusion.prediction=v", "doctor=false",
    ]  # fmt: skip
    ldm(["train", "vae", *words])
    ldm(["train", "ldm", *words])
    pipe = LDMPipeline.from_pretrained(out / f"run-{kind}" / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    given = np.linspace(LEAST[kind] + 0.05 * (MOST[kind] - LEAST[kind]), MOST[kind] * 0.95, 32)
    wanted = [{kind: float(value)} for value in given]
    made: Any = pipe(numbers=wanted, num_inference_steps=12, guidance_scale=1.0, seed=0, output_type="np")
    found = np.array([measure(1 - picture.mean(-1)) for picture in made.images])
    if kind == "angle":
        found = given + (found - given + 90) % 180 - 90  # an axis has no direction
    error = np.abs(found - given).mean()
    ranks = found.argsort().argsort()  # the given ones are in order
    correlation = np.corrcoef(np.arange(len(given)), ranks)[0, 1]
    return f"{kind}: rank correlation {correlation:.3f}, mean error {error:.2f}, n {len(given)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="a folder for pictures and runs")
    parser.add_argument("--steps", type=int, default=400, help="of the U-Net (default: 400)")
    parser.add_argument("--pictures", type=int, default=256, help="to train on (default: 256)")
    arguments = parser.parse_args()
    print("\n".join([examine(kind, arguments.out, arguments.steps, arguments.pictures) for kind in KINDS]))


if __name__ == "__main__":
    main()
