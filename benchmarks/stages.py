"""The time of each stage of `make demo`, and its share of the total.

    python benchmarks/stages.py time LOG NAME COMMAND...    run a command; append its name and seconds to LOG
    python benchmarks/stages.py report LOG...               print the table of these logs

It uses the standard library only, since it times the installation, too.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path


def timed(log: Path, name: str, command: list[str]) -> int:
    """Run a command and log the wall-clock seconds it took, if it succeeded; returns its exit status."""
    start = time.monotonic()
    status = subprocess.call(command)
    if status == 0:
        log.parent.mkdir(parents=True, exist_ok=True)
        kept = [
            line
            for line in (log.read_text("utf-8").splitlines() if log.exists() else [])
            if line.split("\t")[0] != name
        ]
        log.write_text("\n".join([*kept, f"{name}\t{time.monotonic() - start:.1f}"]) + "\n", "utf-8")
    return status


def report(logs: list[Path]) -> str:
    """A table of the stages in these logs, in order, with minutes and shares."""
    rows = [line.split("\t") for log in logs if log.exists() for line in log.read_text("utf-8").splitlines()]
    total = sum(float(seconds) for _, seconds in rows) or 1.0
    lines = [f"{name:<10}{float(seconds) / 60:6.1f} min {float(seconds) / total:5.0%}" for name, seconds in rows]
    return "\n".join([*lines, f"{'together':<10}{total / 60:6.1f} min"])


if __name__ == "__main__":
    if sys.argv[1] == "time":
        sys.exit(timed(Path(sys.argv[2]), sys.argv[3], sys.argv[4:]))
    print(report([Path(log) for log in sys.argv[2:]]))
