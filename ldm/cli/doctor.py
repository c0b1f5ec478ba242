"""`ldm doctor`: can this recipe train on this machine?"""

from __future__ import annotations

import argparse
import sys

from ldm.cli.parser import Command
from ldm.pipelines import import_networks


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--config", required=True, metavar="RECIPE", help="a YAML file, or the name of a recipe that comes with ldm")
    add("overrides", nargs="*", metavar="KEY=VALUE", help="dotted keys that override it, as for `ldm train`")


def run(arguments: argparse.Namespace) -> None:
    import_networks()
    from ldm.cli.config import parse_config
    from ldm.training.doctor import examine

    if not examine.run(parse_config(["--config", arguments.config, *arguments.overrides], prog="ldm doctor")):
        sys.exit(1)


COMMAND = Command(
    "check in a minute whether a recipe can train here: data, VAE, disk, memory, time, learning; exit status 1 if not",
    "ldm doctor --config own64 data.source=my_pictures",
    add_arguments,
    run,
)
