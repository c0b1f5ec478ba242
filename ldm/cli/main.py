"""The command line: `ldm data openmoji | data check | data cache | sample | evaluate | export | push`.

What a command needs is imported when it runs: `ldm --help` doesn't wait for torch and diffusers.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ldm
from ldm.cli import evaluate as cli_evaluate
from ldm.cli import export as cli_export
from ldm.cli import push as cli_push
from ldm.cli import sample as cli_sample
from ldm.pipelines import import_networks
from ldm.system.importing import leave_quickly


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command that the arguments (by default sys.argv's) name; exits with 1 and one line if it can't."""
    leave_quickly()
    words = sys.argv[1:] if arguments is None else list(arguments)
    parsed = build_parser().parse_args(words)
    parsed.command = shlex.join(["ldm", *words])
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    try:
        parsed.run(parsed)
    except (ValueError, OSError, ModuleNotFoundError) as error:
        sys.exit(f"error: {error}")


class Parser(argparse.ArgumentParser):
    """Options may stand between the words of a command: ldm sample MODEL --steps 10 "red heart"."""

    _inside = False

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        has_commands = any(action.nargs == argparse.PARSER for action in self._get_positional_actions())
        if self._inside or has_commands:
            return super().parse_known_args(args, namespace)
        self._inside = True  # the next line comes back here
        try:
            return self.parse_known_intermixed_args(args, namespace)
        finally:
            self._inside = False


def build_parser() -> Parser:
    parser = Parser(prog="ldm", description="A folder of captioned pictures in, a text-to-image model out.")
    parser.add_argument("--version", action="version", version=f"ldm {ldm.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    data = commands.add_parser("data", help="make and check captioned folders")
    kinds = data.add_subparsers(required=True, metavar="COMMAND")
    openmoji = command(
        kinds,
        "openmoji",
        "draw the embedded data set into a captioned folder",
        "ldm data openmoji data/openmoji --size 64",
    )
    openmoji.add_argument("out", help="the folder to make")
    openmoji.add_argument("--size", type=int, default=64, help="edge of the pictures in pixels (default: 64)")
    openmoji.add_argument(
        "--subset", choices=("all", "demo"), default="all", help="all 3,939 drawings, or the few hundred of the demo"
    )
    openmoji.set_defaults(run=run_openmoji)

    check = command(
        kinds, "check", "say what is wrong with a data set, with file and row; exits with 1 if anything is",
        "ldm data check my_pictures",
    )  # fmt: skip
    check.add_argument("source", help="a captioned folder, WebDataset shards, or a Hub data set")
    check.add_argument("--image-column", default="image", help="where a Hub data set has its pictures (default: image)")
    check.add_argument(
        "--caption-columns",
        nargs="+",
        default=["text"],
        metavar="COLUMN",
        help="where the captions are (default: text)",
    )
    check.set_defaults(run=run_check)

    doctor = command(
        commands, "doctor", "say in a minute whether a recipe can train here: data, VAE, disk, time, learning; exits "
        "with 1 on problems", "ldm doctor --config configs/demo.yaml data.source=my_pictures",
    )  # fmt: skip
    doctor.add_argument("--config", required=True, help="a recipe, as the training scripts take it")
    doctor.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="dotted keys that override it")
    doctor.set_defaults(run=run_doctor)

    cache = command(
        kinds, "cache", "say what a cache of latents holds and check every record; exits with 1 if any is damaged",
        "ldm data cache runs/demo/cache",
    )  # fmt: skip
    cache.add_argument("folder", type=Path, help="RUN/cache, or what data.cache names")
    cache.set_defaults(run=run_cache)

    sample = command(commands, "sample", "draw prompts: a picture, a captioned grid, or a folder", cli_sample.EXAMPLE)
    cli_sample.add_arguments(sample)
    sample.set_defaults(run=cli_sample.run)

    evaluate = command(commands, "evaluate", "say how good a model is, in figures", cli_evaluate.EXAMPLE)
    cli_evaluate.add_arguments(evaluate)
    evaluate.set_defaults(run=cli_evaluate.run)

    export = command(commands, "export", "leave a model in a folder of half the size", cli_export.EXAMPLE)
    cli_export.add_arguments(export)
    export.set_defaults(run=cli_export.run)

    push = command(commands, "push", "share a model on the Hub, with a card that says how good it is", cli_push.EXAMPLE)
    cli_push.add_arguments(push)
    push.set_defaults(run=cli_push.run)
    return parser


def command(group: argparse._SubParsersAction[Parser], name: str, summary: str, example: str) -> Parser:
    """A subcommand whose help ends in an example."""
    return group.add_parser(
        name,
        help=summary,
        description=summary[0].upper() + summary[1:] + ".",
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def run_openmoji(arguments: argparse.Namespace) -> None:
    from ldm.data.emoji.openmoji import build

    out = arguments.out
    drawn = build(out, arguments.size, arguments.subset)
    print(f"{drawn} pictures with captions are in {out} (CC BY-SA 4.0, see {out}/ATTRIBUTION.md)")


def run_check(arguments: argparse.Namespace) -> None:
    from ldm.data.dataset import read_captioned, require_training
    from ldm.data.rows import count

    pictures = read_captioned(
        arguments.source, image_column=arguments.image_column, caption_columns=arguments.caption_columns
    )
    require_training(pictures)
    captions = {caption for row in pictures for caption in row.captions}
    print(
        f"{arguments.source} is fine: {count(len(pictures), 'picture')}, {count(len(captions), 'different caption')}, "
        f"{count(len(pictures.heldout), 'picture')} held out"
    )


def run_doctor(arguments: argparse.Namespace) -> None:
    from ldm.cli.config import parse_config

    import_networks()
    config = parse_config(["--config", arguments.config, *arguments.overrides])
    from ldm.training.doctor.examine import run

    if not run(config):
        sys.exit(1)


def run_cache(arguments: argparse.Namespace) -> None:
    from ldm.data.cache.records import DamagedError, Kind, Records
    from ldm.data.rows import count
    from ldm.system.files import gib

    stores = sorted(path.parent for path in arguments.folder.glob("*/manifest.json"))
    if not stores:
        raise ValueError(
            f"{arguments.folder} holds no cache; expected RUN/cache of a run, or what its data.cache names"
        )
    broken = 0
    for store in stores:
        size = gib(sum(path.stat().st_size for path in store.iterdir()))
        try:
            records = Records(store, Kind.of(store))
            bad = sum(1 for _ in records.damaged(progress=True))
            facts = ", ".join(f"{key} {value}" for key, value in records.kind.what.items())
            state = f"{count(bad, 'record')} damaged" if bad else "all whole"
            print(f"{store.name}: {count(len(records), 'record')}, {size}, {state}; {facts}")
        except DamagedError as damage:
            bad = 1
            print(f"{store.name}: {size}; {damage}")
        broken += bool(bad)
    if broken:
        sys.exit("error: the next run that uses this cache encodes anew what is damaged")
