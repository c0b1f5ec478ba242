"""What all commands' parsers share: options between words, examples below the help, paths that begin with ~."""

from __future__ import annotations

import argparse
import difflib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PICTURES = (".png", ".jpg", ".jpeg", ".webp")


@dataclass(frozen=True)
class Command:
    """A command of `ldm`.

    Attributes:
        summary: what it does, in a line.
        examples: a command a line.
        add_arguments: adds its arguments, or its own commands, to its parser.
        run: does it; a group of commands has none.
        usage: what follows `ldm NAME`, where the generated list of all options would be long.
    """

    summary: str
    examples: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], None] | None = None
    usage: str | None = None


class Parser(argparse.ArgumentParser):
    """Options may stand between the words of a command: ldm sample MODEL --steps 10 "red heart"."""

    _inside = False

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        positional = {action.nargs for action in self._get_positional_actions()}
        if self._inside or positional & {argparse.PARSER, argparse.REMAINDER}:
            return super().parse_known_args(args, namespace)
        self._inside = True  # the next line comes back here
        try:
            found, unknown = self.parse_known_intermixed_args(args, namespace)
        finally:
            self._inside = False
        if unknown:  # reported here, with this command's usage
            near = difflib.get_close_matches(unknown[0].split("=")[0], self._option_string_actions, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            self.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
        return found, unknown


def add_commands(parser: argparse.ArgumentParser, commands: dict[str, Command], title: str = "commands") -> None:
    """Add commands whose help ends in examples."""
    group = parser.add_subparsers(required=True, metavar="COMMAND", title=title, parser_class=Parser)
    for name, command in commands.items():
        lines = command.examples.strip().splitlines()
        one = group.add_parser(
            name,
            help=command.summary,
            usage=command.usage and f"{parser.prog} {name} {command.usage}",
            description=command.summary[0].upper() + command.summary[1:] + ".",
            epilog="\n  ".join(["example:" if len(lines) == 1 else "examples:", *lines]),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_arguments(one)
        one.set_defaults(run=command.run)


def feature_extractor(text: str) -> str:
    """A folder, a Hub id, or inception=FILE."""
    kind, equals, name = text.rpartition("=")
    return kind + equals + os.path.expanduser(name)


def positive(text: str) -> int:
    """A whole number of at least 1."""
    if not text.isdecimal() or len(text) > 9 or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text[:20]!r}")
    return int(text)


def port(text: str) -> int:
    """A TCP port."""
    if not text.isdecimal() or len(text) > 5 or not 1 <= int(text) <= 65535:
        raise argparse.ArgumentTypeError(f"expected a port from 1 to 65535, got {text[:20]!r}")
    return int(text)


def path(text: str) -> Path:
    """A path that was typed; a shell leaves the ~ of --out=~/heart.png to the program."""
    return Path(os.path.expanduser(text))


def place(text: str) -> str:
    """A folder or a Hub id that was typed."""
    return os.path.expanduser(text)


def folder(text: str) -> Path:
    """A folder to write into, which need not exist."""
    found = path(text)
    if os.path.exists(found) and not os.path.isdir(found):
        raise argparse.ArgumentTypeError(f"{text} is a file; expected a folder")
    return found


def picture_file(text: str) -> Path:
    """A picture to write; its suffix names the format."""
    found = path(text)
    expected = f"expected a file that ends in {', '.join(PICTURES)}"
    if text.endswith(("/", os.sep)) or os.path.isdir(found):
        raise argparse.ArgumentTypeError(f"{text} is a folder; {expected}, or --each FOLDER")
    if found.suffix.lower() not in PICTURES:
        raise argparse.ArgumentTypeError(f"{text}: {expected}")
    return found
