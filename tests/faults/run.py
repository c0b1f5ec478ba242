"""Break trainings in every way we know and print what came of it.

python tests/faults/run.py --full            # what `make test-faults` runs
python tests/faults/run.py --only kills      # one drill
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

#: drill => its size in the short form and in the full one; for damage the number of (file, damage) pairs, None for all
SIZES = {"kills": (6, 200), "signals": (4, 50), "damage": (1, None), "lost_ranks": (1, 20), "disk": (3, 24),
         "poison": (3, None), "launchers": (0, 1)}  # fmt: skip
#: What must be 0, wherever it is counted.
ZERO = ("hangs", "errors", "losses that differ", "files that differ", "exports lost", "steps lost", "undetected",
        "wrong exit codes", "wrong words", "survivors that stayed", "survivors that left with 0", "resumes that failed",
        "not told and set aside", "checkpoints lost", "not clear", "poisoned tensors", "steps not skipped",
        "not written down", "torchrun --max-restarts=1 failed", "not told", "losses that are not close")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="200 kills instead of 6, and so on")
    parser.add_argument("--only", nargs="+", choices=SIZES, default=list(SIZES), help="these drills alone")
    parser.add_argument("--seed", type=int, default=0, help="of the random moments")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    args = parser.parse_args()

    import disk
    import drills
    import launchers
    import poison

    functions = {"kills": drills.kills, "signals": drills.signals, "damage": drills.damage,
                 "lost_ranks": drills.lost_ranks, "disk": disk.disk, "poison": poison.poison,
                 "launchers": launchers.launchers}  # fmt: skip
    report, broken = {}, []
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        bench = drills.Bench(Path(folder), args.seed)
        for name in args.only:
            if SIZES[name][args.full] == 0:
                continue
            start = time.monotonic()
            figures = functions[name](bench, SIZES[name][args.full])
            report[name] = {**dict(sorted(figures.items())), "seconds": round(time.monotonic() - start)}
            broken += [f"{name}: {key} = {value}" for key, value in figures.items() if key in ZERO and value]
            print(f"{name}: " + ", ".join(f"{key} {value}" for key, value in report[name].items()), flush=True)
    if args.out:
        args.out.write_text(json.dumps(report, indent=2) + "\n", "utf-8")
    if broken:
        sys.exit("BROKEN: " + "; ".join(broken))


if __name__ == "__main__":
    main()
