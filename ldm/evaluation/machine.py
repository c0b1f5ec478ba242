"""How long it takes to draw, and on what machine."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import diffusers
import torch

from ldm.evaluation.settings import Settings
from ldm.evaluation.subject import Subject

WARM = 16
COLD = """
import sys
from ldm import LDMPipeline
pipeline = LDMPipeline.from_pretrained(sys.argv[1]).to_best_device()
pipeline(sys.argv[2], num_inference_steps=int(sys.argv[3]), guidance_scale=float(sys.argv[4]), seed=0)
"""


def machine(device: torch.device) -> dict[str, Any]:
    """What the figures were measured on."""
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
    }


def processor() -> str:
    """The processor's name, as the system tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text("utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def timing(subject: Subject, caption: str, settings: Settings) -> dict[str, Any]:
    """Seconds from the start of a fresh process to its first picture, and for 16 pictures once everything is warm.

    Measured once each, beside whatever else the machine does.
    """
    words = [str(subject.folder), caption, str(settings.steps), str(settings.guidance_scale)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", COLD, *words], check=True, env=environment, capture_output=True)
    cold = time.perf_counter() - started
    subject.draw([caption], 0, settings)  # warm
    started = time.perf_counter()
    subject.draw([caption] * WARM, 0, settings)
    warm = time.perf_counter() - started
    return {
        "first_picture_cold_seconds": round(cold, 2),
        "warm_pictures": WARM,
        "warm_seconds": round(warm, 2),
        "steps": settings.steps,
        "guidance_scale": settings.guidance_scale,
    }
