"""A short but whole road for tests: a folder of shapes, a recipe, and the commands a person would type."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import tiny
import yaml
from PIL import Image, ImageDraw

from ldm.cli.config import parse_config
from ldm.training.config import Config, to_dict

ROOT = Path(__file__).parent.parent
COLORS = {"red": "#d22", "green": "#2a2", "blue": "#24d", "yellow": "#dd2"}
#: What a recipe leaves to `init`, a pipeline of `tiny.pipeline`.
OF_INIT = {"vae": "null", "text__encoder": "minilm", "text__max_length": 32, "unet__attention": [True, True],
           "unet__head_channels": 16}  # fmt: skip
SHAPES = ("heart", "house", "face", "flag", "garden", "cat")


def draw_folder(folder: Path, size: int = tiny.SIZE) -> Path:
    """24 pictures of colored shapes with captions, their color as a class, and an outline to make each of."""
    (folder / "images").mkdir(parents=True)
    (folder / "outlines").mkdir()
    rows = []
    for i, shape in enumerate(SHAPES):
        for color, code in COLORS.items():
            picture = Image.new("RGB", (size, size), "white")
            ImageDraw.Draw(picture).regular_polygon((size / 2, size / 2, size * 0.4), i + 3, fill=code)
            picture.save(folder / "images" / f"{color}_{shape}.png")
            outline = Image.new("RGB", (size, size), "white")
            ImageDraw.Draw(outline).regular_polygon((size / 2, size / 2, size * 0.4), i + 3, outline="black")
            outline.save(folder / "outlines" / f"{shape}.png")
            row = {"file_name": f"images/{color}_{shape}.png", "text": f"{color} {shape}"}
            rows.append({**row, "color": color, "outline": f"outlines/{shape}.png"})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return folder


def cut_folder(folder: Path, out: Path) -> Path:
    """The pictures of a folder, some cut to wide ones and some to tall ones."""
    shutil.copytree(folder, out)
    for i, path in enumerate(sorted((out / "images").iterdir())):
        with Image.open(path) as picture:
            wide, high = picture.size
            picture.crop((0, 0, *((wide, high), (wide, high // 2), (wide // 2, high))[i % 3])).save(path)
    return out


def recipe(folder: Path, **words: Any) -> Config:
    """A config for a few steps on `folder`/data, with a tiny text encoder; `words` are dotted keys with __ for dots."""
    settings = {
        "run": str(folder / "run"),
        "doctor": False,  # tests/training/test_doctor.py has it look
        "data.source": str(folder / "data"),
        "data.size": tiny.SIZE,
        "data.holdout": 0.2,
        "data.workers": 0,
        "text.encoder": str(folder / "text"),
        "text.max_length": tiny.MAX_LENGTH,
        "vae_model.channels": [32, 32],
        "vae_training.steps": 40,
        "vae_training.batch_size": 8,
        "vae_training.log_every": 5,
        "vae_training.warmup": 2,
        "vae_training.lr": 0.003,
        "unet.channels": [32, 64],
        "unet.attention": [False, True],
        "unet.layers": 1,
        "unet.head_channels": 32,
        "optim.lr": 0.002,
        "optim.warmup": 2,
        "loop.steps": 6,
        "loop.batch_size": 8,
        "loop.precision": "fp32",
        "loop.threads": 1,
        "loop.log_every": 2,
        "loop.evaluate_every": 3,
        "loop.sample_every": 6,
        "loop.checkpoint_every": 3,
        "loop.num_inference_steps": 2,
        "loop.prompts": ["red heart", "blue cat"],
        **{key.replace("__", "."): value for key, value in words.items()},
    }
    return parse_config([f"{key}={yaml.safe_dump(value, default_flow_style=True).strip()}" if isinstance(value, list)
                         else f"{key}={value}" for key, value in settings.items()])  # fmt: skip


def save_recipe(config: Config, path: Path) -> Path:
    """The config as the YAML file that a person would keep."""
    path.write_text(yaml.safe_dump(to_dict(config)), "utf-8")
    return path


def processes_of(run: Path) -> set[int]:
    """How many processes trained together, as the run's checkpoints say."""
    return {json.loads(file.read_text("utf-8"))["processes"] for file in run.glob("checkpoints/*/*/state.json")}


def launch(script: str, config: Path, *words: str, processes: int = 1, cpu: bool = True, precision: str = "no") -> str:
    """Run a training script through the real `accelerate launch`; returns what it printed.

    Args:
        cpu: also where there is a GPU.
        precision: what accelerate is launched with.
    """
    command = [
        Path(sys.executable).with_name("accelerate"),
        "launch",
        "--num_machines",
        "1",
        "--mixed_precision",
        precision,
    ]
    command += [
        "--dynamo_backend",
        "no",
        "--num_processes",
        str(processes),
        *(["--multi_gpu"] if processes > 1 else ["--cpu"] if cpu else []),
    ]
    environment = {**os.environ, "ACCELERATE_USE_CPU": str(cpu).lower(), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*map(str, command), f"train/{script}.py", "--config", str(config), *words],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def logged(run: Path, name: str) -> dict[int, float]:
    """step => the last logged value of this name."""
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text("utf-8").splitlines()]
    return {row["step"]: row[name] for row in rows if name in row}


def replace(config: Config, **words: Any) -> Config:
    """A config with other values: run=..., loop={"steps": 3}."""
    sections = {
        name: dataclasses.replace(getattr(config, name), **value) if isinstance(value, dict) else value
        for name, value in words.items()
    }
    return dataclasses.replace(config, **sections)
