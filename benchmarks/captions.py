"""How good the captions are that `ldm data caption --from clip` suggests: half of a data set's are hidden first.

    python -m benchmarks.captions data/openmoji --out runs/captions

Two questions, each against chance (the same suggestions, for the wrong pictures):

names   all captions are candidates, the hidden ones too: is the picture's own among the first five?
others  candidates are the captions that were left: does one of the first five share a word with the hidden caption?
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from ldm.cli.main import main as ldm
from ldm.data.rows import split_of
from ldm.evaluation.metrics.intervals import proportion_estimate
from ldm.evaluation.report.text import percent, with_interval

SMALL_WORDS = frozenset(("and", "with", "the", "of", "on", "in", "skin", "tone", "flag"))


def hide(source: Path, out: Path) -> tuple[dict[str, str], list[str]]:
    """Copy a folder with metadata.jsonl and half of its captions; returns the hidden ones by file, and all."""
    rows = [json.loads(line) for line in (source / "metadata.jsonl").read_text("utf-8").splitlines()]
    every = sorted({row["text"] for row in rows})
    hidden = {row["file_name"]: row.pop("text") for row in rows if split_of(f"hidden {row['text']}", 0.5) == "heldout"}
    shutil.copytree(source, out, dirs_exist_ok=True)
    (out / "metadata.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    return hidden, every


def suggestions(data: Path, out: Path, epochs: int, text: str, more: Sequence[str] = ()) -> dict[str, list[str]]:
    """The five suggestions of each picture without a caption."""
    table = out / "suggestions.csv"
    ldm(["data", "caption", str(data), "--from", "clip", "--clip", str(out / "net"), "--epochs", str(epochs),
         "--clip-text", text, "--dry-run", "--table", str(table), *more])  # fmt: skip
    with table.open(newline="", encoding="utf-8") as file:
        return {row["file_name"]: list(row.values())[1:] for row in csv.DictReader(file)}


def words(caption: str) -> set[str]:
    """The words of a caption that say something."""
    return {word for word in re.findall(r"[^\W\d_]{3,}", caption.lower()) if word not in SMALL_WORDS}


def shares(found: Mapping[str, Sequence[str]], hidden: Mapping[str, str], *, exact: bool, most: int) -> str:
    """How often one of the first suggestions is right, with its interval, and for the wrong pictures."""
    files = list(hidden)

    def right(file: str, of: str) -> bool:
        first = found[file][:most]
        return hidden[of] in first if exact else any(words(each) & words(hidden[of]) for each in first)

    hits = sum(right(file, file) for file in files)
    chance = sum(right(file, other) for file, other in zip(files, files[len(files) // 2 :] + files)) / len(files)
    return f"{with_interval(proportion_estimate(hits, len(files)), percent)}, chance {chance:.1%}, n {len(files)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="a folder with metadata.jsonl")
    parser.add_argument(
        "--out", type=Path, required=True, help="a folder for the copy, the network and the suggestions"
    )
    parser.add_argument("--epochs", type=int, default=20, help="of the in-domain CLIP (default: 20)")
    parser.add_argument("--text", default="minilm", help="its text encoder (default: minilm)")
    arguments = parser.parse_args()
    out: Path = arguments.out
    hidden, every = hide(arguments.data, out / "half")
    (out / "names.txt").write_text("\n".join(every) + "\n", "utf-8")
    for title, more, exact in (
        ("others", (), False),
        ("names", ("--candidates", str(out / "names.txt")), True),
    ):
        found = suggestions(out / "half", out, arguments.epochs, arguments.text, more)
        for most in (1, 5):
            print(f"{title}, top-{most}: {shares(found, hidden, exact=exact, most=most)}")


if __name__ == "__main__":
    main()
