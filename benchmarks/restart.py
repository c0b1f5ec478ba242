"""Seconds that a resumed run takes to read its pictures, against another checkout of this project.

    python -m benchmarks.restart --against ../before                # 20,000 unchanged pictures of 64 px
    python -m benchmarks.restart --against ../before --pictures 2000 --edge 256

Measured in fresh processes, without imports: reading the metadata, checking every picture, and hashing its content, the
key of the cache. Both arms have run once before, so that each can use what it remembers. The other checkout may be one
that decodes every picture at every start (before ldm/data/facts.py).
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from benchmarks.harness import ROOT, Comparison, Measured, Target, arguments, compare, environment, report

RESTART = Target(0.2, 0.1)  # of the other checkout's seconds
NOW = """
import json, sys, time
from pathlib import Path
from ldm.data.cache.latents import Builder
from ldm.data.dataset import read_captioned

source, memory = sys.argv[1], Path(sys.argv[2])
start = time.perf_counter()
pictures = read_captioned(source, facts=memory, progress=False)
read = time.perf_counter()
hashes = Builder(memory, progress=False).hashes(pictures)
end = time.perf_counter()
assert len(hashes) == len(pictures)
print(json.dumps({"value": end - start, "reading and checking": read - start, "hashes": end - read}))
"""
BEFORE = """
import json, sys, time
from pathlib import Path
from ldm.data.captioned import read_captioned
from ldm.data.contents import CONTENTS, contents
from ldm.data.filling import Writer

source, memory = sys.argv[1], Path(sys.argv[2])
start = time.perf_counter()
pictures = read_captioned(source, progress=False)
read = time.perf_counter()
with Writer(memory / "contents", CONTENTS) as writer:
    hashes = contents(pictures, writer, False)
end = time.perf_counter()
assert len(hashes) == len(pictures)
print(json.dumps({"value": end - start, "reading and checking": read - start, "hashes": end - read}))
"""


def make(folder: Path, count: int, edge: int) -> None:
    """Write so many pictures, drawings on a plain ground, with a metadata file."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    lines = []
    for number in tqdm(range(count), "writing pictures", unit="picture"):
        array = np.full((edge, edge, 3), rng.integers(0, 256, 3), np.uint8)
        for _ in range(6):
            left, top, width, height = rng.integers(1, edge, 4)
            array[top : top + height, left : left + width] = rng.integers(0, 256, 3)
        Image.fromarray(array).save(folder / f"{number:06}.png")
        lines.append(json.dumps({"file_name": f"{number:06}.png", "text": f"drawing {number}"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines), "utf-8")
    time.sleep(3)  # files that changed within the last seconds are not remembered


def start_of(checkout: Path, source: Path, memory: Path, threads: int) -> Callable[[], Measured]:
    """An arm: a fresh process that reads the pictures as a run of this checkout does."""
    script = NOW if (checkout / "ldm/data/facts.py").exists() else BEFORE

    def arm() -> Measured:
        command = [sys.executable, "-c", script, str(source), str(memory)]
        variables = environment(threads, PYTHONPATH=str(checkout))
        output = subprocess.run(command, cwd=checkout, env=variables, capture_output=True, text=True)
        if output.returncode:
            raise SystemExit(f"{checkout}: {output.stderr[-3000:]}")
        measured: Measured = json.loads(output.stdout.splitlines()[-1])
        return measured

    return arm


def main() -> None:
    """Measure and report."""
    parser = arguments(__doc__, pairs=6)
    parser.add_argument("--against", type=Path, required=True, help="another checkout of this project")
    parser.add_argument("--pictures", type=int, default=20_000, help="number of pictures (default: 20,000)")
    parser.add_argument("--edge", type=int, default=64, help="of the pictures, in pixels (default: 64)")
    chosen = parser.parse_args()
    out = chosen.out.resolve()
    source = out / f"restart-{chosen.pictures}-{chosen.edge}"
    if not source.exists():
        make(source, chosen.pictures, chosen.edge)
    ours, peer = (
        start_of(checkout.resolve(), source, out / f"restart-memory-{name}", chosen.threads)
        for name, checkout in (("ours", ROOT), ("peer", chosen.against))
    )
    for name, first in (("ours", ours), ("the other", peer)):
        print(f"first start of {name}: {first()['value']:.2f} s", file=sys.stderr)
    found = compare(Comparison("restart (lower is better)", "s", target=RESTART), ours, peer, chosen.pairs)
    report(
        "restart", [found], out, chosen.threads, pictures=chosen.pictures, edge=chosen.edge, against=str(chosen.against)
    )


if __name__ == "__main__":
    main()
