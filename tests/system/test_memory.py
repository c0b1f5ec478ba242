"""Freed memory: the kernel's own counters of pages say whether it was kept or given back."""

from __future__ import annotations

import json
import platform
import subprocess
import sys

import pytest

from benchmarks.harness import ROOT

PEAK = """
import subprocess, sys
from ldm.system.memory import peak_bytes
held = b"x" * (int(sys.argv[1]) << 20)
print(peak_bytes() >> 20, flush=True)
del held
if sys.argv[1] != "0":
    subprocess.run([sys.executable, "-c", sys.argv[2], "0", ""], check=True)
"""

COUNT = """
import json, resource, statistics, sys
import torch
from ldm.system.memory import give_back, keep_freed_memory

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()

def step():  # like activations: many at once, of several sizes, freed together
    kept = [torch.ones(2**20 * size) for size in (1, 2, 4, 8, 16)]
    return sum(tensor[0].item() for tensor in kept)

if sys.argv[1] == "keep":
    keep_freed_memory()
counts = []
for _ in range(15):
    before = faults()
    step()
    counts.append(faults() - before)
told = {"faults": statistics.median(counts)}
full = resident()
give_back()
told["given back"] = full - resident()
print(json.dumps(told))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no such settings")
def test_freed_memory_is_kept_for_the_next_step_and_given_back_when_asked() -> None:
    def counted(how: str) -> dict[str, float]:
        done = subprocess.run([sys.executable, "-c", COUNT, how], cwd=ROOT, check=True, capture_output=True, text=True)
        return json.loads(done.stdout)

    pages = 4 * 31 * 2**20 / 4096  # of one step
    default, kept = counted("default"), counted("keep")
    assert default["faults"] > 0.5 * pages  # what is to be avoided does happen
    assert kept["faults"] < 0.01 * pages
    assert kept["given back"] > 0.9 * 4 * 31 * 2**20


def test_the_peak_is_this_process_s_own_and_not_that_of_the_one_that_started_it() -> None:
    """getrusage begins with the peak of the one that started it, such as a benchmark that has built weights."""
    words = [sys.executable, "-c", PEAK, "300", PEAK]
    told = subprocess.run(words, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    large, small = (int(line) for line in told.split())
    assert large >= 300
    assert 1 <= small < 100
