"""What torchrun does to a training, and a training to torchrun; and going on with another number of processes."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import road
from drills import Bench, Figures
from world import KINDS, clean, losses, newest_step, saved_in

VICTIM = Path(__file__).with_name("victim.py")


def torchrun(kind: str, config: Any, home: Path, restarts: int, **environment: str) -> subprocess.Popen[str]:
    """Two processes under torchrun; rank 1 kills itself where VICTIM_STEP says, in its first life."""
    recipe = road.save_recipe(config, home / f"{Path(config.run).name}.yaml")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += ["--max-restarts", str(restarts), str(VICTIM), "--config", str(recipe)]
    known = {"PYTHONPATH": str(road.ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "VICTIM_TASK": KINDS[kind]}
    return subprocess.Popen(
        command,
        cwd=road.ROOT,
        env={**os.environ, **known, **environment},
        stdout=(home / "torchrun.txt").open("w"),
        stderr=subprocess.STDOUT,
        text=True,
    )


def launchers(bench: Bench, trials: int) -> Figures:
    """A rank lost under torchrun, SIGTERM to torchrun, two processes then one."""
    figures: Counter[str] = Counter()
    for name in ("losses that differ", "files that differ", "steps lost", "not told", "losses that are not close"):
        figures[name] = 0
    home = bench.world.home
    for trial, kind in itertools.product(range(trials), ("cached", "vae", "classifier")):
        config = bench.world.recipe(kind, home / f"restarted-{kind}-{trial}")
        with clean(config):
            figures["torchrun --max-restarts=1 failed"] += (
                torchrun(kind, config, home, 1, VICTIM_STEP="5").wait(900) != 0
            )
            bench.compare(kind, config, figures, processes=2)

        config = bench.world.recipe(kind, home / f"regrouped-{kind}-{trial}")
        with clean(config):
            agent = torchrun(kind, config, home, 0)
            log = Path(config.run) / "log.jsonl"
            while agent.poll() is None and not (log.exists() and len(losses(config)) >= 2):
                time.sleep(0.01)
            running = losses(config)[-1][0]
            agent.send_signal(signal.SIGTERM)
            figures[f"torchrun's exit code after SIGTERM: {agent.wait(120)}"] += 1
            figures["steps lost"] += max(0, running - newest_step(kind, config))
            # and the rest in one process: the same samples, summed in another order
            child = bench.world.train(kind, config)
            figures["errors"] += child.wait() != 0
            figures["not told"] += (
                "processes 2 => 1" not in child.words or "not exact to the last bit" not in child.words
            )
            expected = bench.reference(kind).losses
            figures["losses that are not close"] += sum(
                abs(float(loss) / float(expected[step]) - 1) > 1e-4 for step, loss in losses(config)
            )
            figures["regrouped"] += saved_in(kind, config).exists()
    return figures
