"""A module that is put off costs nothing until it is used, and then is what it always was."""

from __future__ import annotations

import subprocess
import sys

import road

SCIPY = """
import sys
from ldm import LDMPipeline
assert "scipy.stats._stats_py" not in sys.modules, "it was executed"
from diffusers import DPMSolverMultistepScheduler
scheduler = DPMSolverMultistepScheduler(use_beta_sigmas=True)
scheduler.set_timesteps(5)
assert "scipy.stats._stats_py" in sys.modules
import scipy.stats
assert scipy.stats.norm.cdf(0) == 0.5 and scipy.stats is sys.modules["scipy.stats"]
print(scheduler.sigmas.tolist())
"""
PLAIN = """
from diffusers import DPMSolverMultistepScheduler
scheduler = DPMSolverMultistepScheduler(use_beta_sigmas=True)
scheduler.set_timesteps(5)
print(scheduler.sigmas.tolist())
"""
NOTHING = """
import sys
from ldm.lazily import put_off
for name in ("no_such_package", "no_such_package.part", "json", "scipy.no_such_part"):
    put_off(name)
assert not any(name.startswith("no_such") for name in sys.modules) and "scipy.no_such_part" not in sys.modules
import json
assert json.loads("[1]") == [1]
print("fine")
"""


def run(code: str) -> str:
    told = f"import sys; sys.path.insert(0, {str(road.ROOT)!r})\n{code}"
    done = subprocess.run([sys.executable, "-c", told], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_scipys_statistics_come_when_a_scheduler_wants_them() -> None:
    assert run(SCIPY) == run(PLAIN)


def test_what_is_not_there_or_there_already_is_left_alone() -> None:
    assert run(NOTHING).strip() == "fine"
