"""The method of all benchmarks: interleaved pairs, a canary, a confidence interval, a table, and a JSON file.

A result is a ratio of two arms measured in turns in one run, because the speed of shared cores drifts by a factor of
ten. The arms alternate, A B B A, so that a steady drift favors neither. Each pair gives one ratio; their median is
reported with a bootstrap interval. A canary, a matrix product of fixed size, is timed before, between and after: if it
changes within a pair, the machine was busy with something else, and the table counts that pair as disturbed. No pair is
ever dropped.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

ROOT = Path(__file__).resolve().parent.parent
RESAMPLES = 10_000
DISTURBED = 1.25  # a pair counts as disturbed if its canaries differ by more than this factor
PACKAGES = ("torch", "torchvision", "diffusers", "transformers", "accelerate", "datasets", "numpy", "pillow", "gradio")

#: One measurement: {"value": the number that the ratio is made of, and further entries for the JSON}.
Measured = dict[str, Any]


@dataclass(frozen=True)
class Target:
    """The required and the desired value of a ratio."""

    floor: float
    aim: float


@dataclass
class Comparison:
    """Two arms and all their pairs.

    Attributes:
        name: of the comparison, with the setting.
        unit: of the arms' values.
        ratio: direction of the ratio: "ours/peer" for rates and bytes, "peer/ours" for seconds.
        pairs: {"order", "ours", "peer", "ratio", "canary"}, the last in GFLOP/s before, between and after.
    """

    name: str
    unit: str
    ratio: Literal["ours/peer", "peer/ours"] = "ours/peer"
    target: Target | None = None
    pairs: list[dict[str, Any]] = field(default_factory=list)

    @property
    def ratios(self) -> list[float]:
        return [pair["ratio"] for pair in self.pairs]

    def pair(self, order: Sequence[str], ours: Measured, peer: Measured, canary: Sequence[float]) -> None:
        """Add a measured pair."""
        a, b = ours["value"], peer["value"]
        ratio = a / b if self.ratio == "ours/peer" else b / a
        self.pairs.append({"order": order, "ours": ours, "peer": peer, "ratio": ratio, "canary": canary})

    def with_values(self, other: Comparison, value: Callable[[Measured], float]) -> Comparison:
        """Add another comparison's pairs with another value: `value` of each measurement."""
        for pair in other.pairs:
            ours, peer = ({**pair[arm], "value": value(pair[arm])} for arm in ("ours", "peer"))
            self.pair(pair["order"], ours, peer, pair["canary"])
        return self

    def summary(self) -> dict[str, Any]:
        """The median of the pairs' ratios, its 95 % interval, and the arms' medians."""
        low, high = median_interval(self.ratios)
        return {
            "ratio": statistics.median(self.ratios),
            "low": low,
            "high": high,
            "ours": statistics.median(pair["ours"]["value"] for pair in self.pairs),
            "peer": statistics.median(pair["peer"]["value"] for pair in self.pairs),
            "pairs": len(self.pairs),
            "disturbed": sum(max(pair["canary"]) > DISTURBED * min(pair["canary"]) for pair in self.pairs),
        }


def compare(
    comparison: Comparison,
    ours: Callable[[], Measured],
    peer: Callable[[], Measured],
    pairs: int,
    canary: Callable[[], float] | None = None,
) -> Comparison:
    """Measure `pairs` more pairs in the order A B B A, which takes two; each arm returns {"value": float, …}."""
    canary = canary or gemm
    arms = {"ours": ours, "peer": peer}
    for _ in range(pairs):
        order = ["ours", "peer"] if len(comparison.pairs) % 2 == 0 else ["peer", "ours"]
        measured, canaries = {}, [canary()]
        for arm in order:
            measured[arm] = arms[arm]()
            canaries.append(canary())
        comparison.pair(order, measured["ours"], measured["peer"], canaries)
        a, b, ratio = measured["ours"]["value"], measured["peer"]["value"], comparison.ratios[-1]
        result = f"ours {a:.4g}, peer {b:.4g} {comparison.unit}, ratio {ratio:.3g}"
        print(f"{comparison.name}: pair {len(comparison.pairs)}: {result}", file=sys.stderr, flush=True)
    return comparison


def median_interval(values: Sequence[float], seed: int = 0, resamples: int = RESAMPLES) -> tuple[float, float]:
    """The 2.5 and 97.5 % quantiles of the median of bootstrap samples (Efron 1979).

    With few pairs it is too narrow: a median of resamples never leaves the range of the pairs.
    """
    rng = random.Random(seed)
    medians = sorted(statistics.median(rng.choices(values, k=len(values))) for _ in range(resamples))
    return medians[int(0.025 * resamples)], medians[int(0.975 * resamples)]


def gemm(size: int = 1024, seconds: float = 0.2) -> float:
    """The canary: GFLOP/s of float32 matrix products [size, size] in this process, the best within `seconds`."""
    import torch

    a, b = (torch.full((size, size), 1.0 + i) for i in range(2))
    best, end = 0.0, time.perf_counter() + seconds
    while best == 0.0 or time.perf_counter() < end:
        start = time.perf_counter()
        torch.mm(a, b)
        best = max(best, 2 * size**3 / (time.perf_counter() - start) / 1e9)
    return best


def environment(threads: int, **variables: str) -> dict[str, str]:
    """The environment of a measured process: number of CPU threads, no network, this checkout's packages."""
    return {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "ACCELERATE_USE_CPU": "true",
        "PYTHONPATH": str(ROOT),
        **variables,
    }


def fresh(command: Sequence[str | Path], threads: int, log: Path, **variables: str) -> None:
    """Run a command offline in a fresh process with this many CPU threads; its output goes to `log`.

    Raises:
        SystemExit: if it fails, with the end of its output.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w", encoding="utf-8") as out:
        words = [str(word) for word in command]
        status = subprocess.run(
            words, cwd=ROOT, env=environment(threads, **variables), stdout=out, stderr=subprocess.STDOUT
        ).returncode
    if status:
        end = log.read_text("utf-8", errors="replace").replace("\r", "\n")[-3000:]
        raise SystemExit(f"{' '.join(words)}\nended with status {status}; {log} ends with:\n{end}")


def arguments(description: str | None, pairs: int = 4) -> argparse.ArgumentParser:
    """A parser with the options of all benchmarks."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=pairs, help="pairs per comparison, even: their order is A B B A")
    parser.add_argument("--threads", type=int, default=len(cores()), help="CPU threads of each process, both arms")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "bench", help="the folder for JSON and logs")
    return parser


def cores() -> list[int]:
    """The cores that this process may use."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))


def conditions(threads: int, device: Any = None) -> dict[str, Any]:
    """Machine, versions, commit and command line of a result; device is the CPU by default."""
    import torch

    from ldm.evaluation.provenance import machine

    return {
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "machine": {
            **machine(device or torch.device("cpu")),
            "threads": threads,
            "cores_used": cores(),
            "load": list(os.getloadavg()),
            "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        },
        "versions": {name: version for name in PACKAGES if (version := installed(name))},
        "commit": commit(),
    }


def installed(name: str) -> str | None:
    """The version of a package, or None if it isn't installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def commit() -> str | None:
    """The commit of this checkout, with "+" if there are changes; None without git."""
    try:
        words = ["git", "-C", str(ROOT)]
        name = subprocess.check_output([*words, "rev-parse", "HEAD"], text=True, stderr=subprocess.DEVNULL).strip()
        changes = subprocess.check_output([*words, "status", "--porcelain", "--untracked-files=no"], text=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return name + ("+" if changes.strip() else "")


def report(
    name: str, comparisons: Sequence[Comparison], out: Path, threads: int, device: Any = None, **facts: Any
) -> Path:
    """Print the table and write OUT/NAME.json: circumstances, facts, and every comparison with all its raw pairs."""
    print(table(comparisons))
    record = {
        "benchmark": name,
        **conditions(threads, device),
        **facts,
        "comparisons": [
            {
                "name": comparison.name,
                "unit": comparison.unit,
                "direction": comparison.ratio,
                "target": comparison.target and {"floor": comparison.target.floor, "aim": comparison.target.aim},
                **comparison.summary(),
                "raw": comparison.pairs,
            }
            for comparison in comparisons
        ],
    }
    return write(out / f"{name}.json", record)


def write(path: Path, record: dict[str, Any]) -> Path:
    """Write a JSON file and print its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n", "utf-8")
    print(f"raw pairs, machine, versions and commit: {path}")
    return path


def table(comparisons: Sequence[Comparison]) -> str:
    """One line per comparison, for a terminal and for Markdown."""
    rows = [["comparison", "ratio", "95 %", "floor / aim", "ours", "peer", "unit", "pairs", "disturbed"]]
    for comparison in comparisons:
        found, target = comparison.summary(), comparison.target
        rows.append([
            comparison.name, f"{found['ratio']:.2f}", f"{found['low']:.2f} to {found['high']:.2f}",
            f"{target.floor:g} / {target.aim:g}" if target else "", f"{found['ours']:.4g}", f"{found['peer']:.4g}",
            comparison.unit, str(found["pairs"]), str(found["disturbed"]),
        ])  # fmt: skip
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |" for row in rows]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)
