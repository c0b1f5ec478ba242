"""What people type => a Config.

    ldm train ldm --config demo optim.lr=3e-4 loop.steps=2000

A later word overrides an earlier one; `--print_config` prints the result. An unknown key is an error that names the
nearest known one. A recipe is a YAML file, or the name of one that comes with this package.
"""

from __future__ import annotations

import dataclasses
import difflib
import errno
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn, get_type_hints

from ldm.cli.recipes import find_recipe
from ldm.pipelines import import_networks
from ldm.system.checks import check_plain
from ldm.system.importing import leave_quickly, quiet_libraries
from ldm.training.config import Config

LINE = 600  # characters of an error


def keys(cls: Any = Config, prefix: str = "") -> list[str]:
    """Every dotted key of the config: run, seed, ..., optim.lr, ..."""
    hints = get_type_hints(cls)
    found = []
    for item in dataclasses.fields(cls):
        kind = hints[item.name]
        found += keys(kind, f"{prefix}{item.name}.") if dataclasses.is_dataclass(kind) else [prefix + item.name]
    return found


def parse_config(args: Sequence[str] | None = None, description: str | None = None, prog: str | None = None) -> Config:
    """The command line => a Config; exits with status 2 and one line if it is wrong.

    Args:
        args: words such as ["--config", "demo", "optim.lr=3e-4"]; sys.argv's by default.
        description: the program's help text.
        prog: the program's name; by default that of sys.argv.
    """
    from jsonargparse import ArgumentParser, Namespace

    from ldm.system import plain_yaml

    class Parser(ArgumentParser):
        def error(self, message: str, ex: Exception | None = None) -> NoReturn:
            line = in_words(" ".join(str(message).split()))
            self.exit(2, f"{self.prog}: error: {line if len(line) <= LINE else line[:LINE] + '…'}\n")

    usage = "%(prog)s [--config RECIPE] [KEY=VALUE ...] [--print_config]"
    parser = Parser(prog=prog, usage=usage, description=description, default_meta=False, parser_mode=plain_yaml.MODE)
    parser.add_argument("--config", action="config", help="a YAML file or a recipe's name; later words override it")
    parser.add_class_arguments(Config)
    try:
        parsed: Namespace = parser.parse_args(list(completed(sys.argv[1:] if args is None else args)))
        check_plain(Config, vars(parsed))
        values = parser.instantiate_classes(parsed)
        return Config(**{item.name: values[item.name] for item in dataclasses.fields(Config)})
    except UnicodeDecodeError:
        parser.error("--config: the file is not UTF-8")
    except ValueError as error:
        parser.error(str(error))


def completed(words: Sequence[str]) -> Iterator[str]:
    """Words as the parser takes them: the dashes of dotted overrides put in, recipes replaced by their files."""
    before = None
    for word in words:
        if before == "--config":
            yield find_recipe(word)
        elif word.startswith("--config="):
            yield "--config=" + find_recipe(word.removeprefix("--config="))
        else:
            yield f"--{word}" if re.match(r"[a-z_]+(\.[a-z_]+)*=", word) else word
        before = word


def in_words(message: str) -> str:
    """The parser's message: about an unknown key with the nearest known one, about a list with how it is written."""
    no_list = re.fullmatch(r'Parser key "([\w.]+)": Expected a <class .tuple.>. Got value: ([\w.]+)', message)
    if no_list:
        return f"{no_list[1]}: expected a list, as {no_list[1]}=[{no_list[2]}], got {no_list[2]}"
    in_file = re.search(r"Group '([\w.]+)' does not accept option '(\w+)'", message)
    on_line = re.search(r"unrecognized arguments: -*([\w.]+)", message)
    top = re.search(r"[Oo]ption '([\w.]+)' is not", message)
    if in_file:
        unknown = f"{in_file[1]}.{in_file[2]}"
    elif on_line:
        unknown = on_line[1]
    elif top:
        unknown = top[1]
    else:
        return message
    known = keys() + [item.name for item in dataclasses.fields(Config)]
    near = difflib.get_close_matches(unknown, known, n=1, cutoff=0.5)
    return f"unknown key {unknown}" + (f"; did you mean {near[0]}?" if near else "; --help lists the keys")


def start(
    main: Callable[[Config], object],
    description: str | None,
    words: Sequence[str] | None = None,
    prog: str | None = None,
) -> None:
    """Parse the command line and run `main`; an error that says what to do, or a signal, ends the program with a line.

    Exit codes: 0 done, 1 an error, 2 a wrong command line; 130 Ctrl-C, 143 SIGTERM, 75 SIGUSR1 (saved, start me
    again); 76 another rank died (docs/reliability.md).
    """
    quiet_libraries()
    from ldm.system.errors import RunError
    from ldm.training.signals import Stopped, install

    install()
    leave_quickly()
    import_networks()
    from ldm.training.distributed import leave_group

    try:
        main(parse_config(words, description, prog))
    except (ValueError, OSError, ModuleNotFoundError, RunError) as error:
        leave_group()
        full = isinstance(error, OSError) and error.errno == errno.ENOSPC
        way_out = "; make room, then run the same command again to resume" if full else ""
        sys.exit(f"error: {error}{way_out}")
    except Stopped as stopped:
        leave_group()
        if os.environ.get("RANK", "0") == "0":
            print(f"\n{stopped.signal.name}: {stopped.saved}; run the same command again to resume", file=sys.stderr)
        raise
