"""The command line: `ldm data | doctor | train | sample | edit | upscale | walk | evaluate | compare | export | …`.

A command imports what it needs when it runs: `ldm --help` does not wait for torch, diffusers or gradio.
"""

from __future__ import annotations

import shlex
import sys
import warnings
from collections.abc import Sequence
from typing import Any

import ldm
from ldm.cli import app, compare, data, doctor, edit, evaluate, export, push, sample, train, upscale, walk
from ldm.cli.parser import Parser, add_commands
from ldm.system.importing import leave_quickly, quiet_libraries

COMMANDS = {
    "data": data.COMMAND,
    "doctor": doctor.COMMAND,
    "train": train.COMMAND,
    "sample": sample.COMMAND,
    "edit": edit.COMMAND,
    "upscale": upscale.COMMAND,
    "walk": walk.COMMAND,
    "evaluate": evaluate.COMMAND,
    "compare": compare.COMMAND,
    "export": export.COMMAND,
    "push": push.COMMAND,
    "app": app.COMMAND,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command that the arguments (by default sys.argv's) name; an error is one line and exit status 1."""
    leave_quickly()
    words = sys.argv[1:] if arguments is None else list(arguments)
    parsed = build_parser().parse_args(words)
    parsed.command = shlex.join(["ldm", *words])
    quiet_libraries()
    if arguments is None:  # the process is the command's
        warnings.formatwarning = as_line
    try:
        parsed.run(parsed)
    except (ValueError, OSError, ModuleNotFoundError) as error:
        sys.exit(f"error: {in_words(error)}")


def as_line(message: Warning | str, *_: Any, **__: Any) -> str:
    """A warning without the line of code that issued it."""
    return f"warning: {message}\n"


def in_words(error: Exception) -> str:
    """An error as one line; those of the operating system begin with the file, like ours."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror.lower()}"
    return str(error)


def build_parser() -> Parser:
    """The parser of all commands."""
    parser = Parser(
        prog="ldm", description="Train text-to-image models on your own pictures, evaluate them, generate with them."
    )
    parser.add_argument("--version", action="version", version=f"ldm {ldm.__version__}")
    add_commands(parser, COMMANDS, "commands (ldm COMMAND --help explains one)")
    return parser


if __name__ == "__main__":  # accelerate launch --module ldm.cli.main train ldm …
    main()
