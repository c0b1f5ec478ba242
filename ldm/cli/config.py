"""What people type => a Config.

    accelerate launch train/train_ldm.py --config configs/demo.yaml optim.lr=3e-4 loop.steps=2000

A later word overrides an earlier one; `--print_config` shows what it all comes to. A key that doesn't
exist is an error that names the nearest one that does.
"""

from __future__ import annotations

import dataclasses
import difflib
import errno
import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, get_type_hints

from ldm.pipelines import import_networks
from ldm.system.checks import check_plain
from ldm.system.importing import leave_quickly
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


def parse_config(args: Sequence[str] | None = None, description: str | None = None) -> Config:
    """The command line => a Config; exits with status 2 and one clear line if it is wrong.

    Args:
        args: words such as ["--config", "configs/demo.yaml", "optim.lr=3e-4"]; sys.argv's by default.
        description: the program's help text.
    """
    from jsonargparse import ArgumentParser, Namespace

    from ldm.system import plain_yaml

    class Parser(ArgumentParser):
        def error(self, message: str, ex: Exception | None = None) -> NoReturn:
            line = " ".join(nearest_key(str(message)).split())
            self.exit(2, f"{self.prog}: error: {line if len(line) <= LINE else line[:LINE] + '…'}\n")

    parser = Parser(description=description, default_meta=False, parser_mode=plain_yaml.MODE)
    parser.add_argument("--config", action="config", help="a YAML file; words after it override it")
    parser.add_class_arguments(Config)
    words = sys.argv[1:] if args is None else list(args)
    # dotted overrides may leave out the dashes: optim.lr=3e-4
    words = [f"--{word}" if re.match(r"[a-z_]+(\.[a-z_]+)*=", word) else word for word in words]
    try:
        parsed: Namespace = parser.parse_args(words)
        check_plain(Config, vars(parsed))
        values = parser.instantiate_classes(parsed)
        return Config(**{item.name: values[item.name] for item in dataclasses.fields(Config)})
    except UnicodeDecodeError:
        parser.error("--config: the file is not UTF-8")
    except ValueError as error:
        parser.error(str(error))


def nearest_key(message: str) -> str:
    """The parser's complaint about an unknown key, with the nearest key that exists."""
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


def start(main: Callable[[Config], object], description: str | None) -> None:
    """Parse the command line and run `main`; errors that say what to do, and signals, end the program with words.

    Exit codes: 0 done, 1 an error, 2 a wrong command line; 130 Ctrl-C, 143 SIGTERM, 75 SIGUSR1 (saved, start me
    again); 76 another rank is gone (docs/reliability.md).
    """
    # their warnings concern their own authors: no torchvision, a BERT where CLIP was expected
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    from ldm.system.errors import RunError
    from ldm.training.signals import Stopped, install

    install()
    leave_quickly()
    import_networks()
    try:
        main(parse_config(description=description))
    except (ValueError, OSError, ModuleNotFoundError, RunError) as error:
        leave_group()
        full = isinstance(error, OSError) and error.errno == errno.ENOSPC
        way_out = "; make room, then the same command goes on from where it was" if full else ""
        sys.exit(f"error: {error}{way_out}")
    except Stopped as stopped:
        leave_group()
        if os.environ.get("RANK", "0") == "0":
            print(f"\n{stopped.signal.name}: {stopped.saved}; the same command goes on from there", file=sys.stderr)
        raise


def leave_group() -> None:
    """Take leave of the other ranks, if torch has been loaded and there are any."""
    distributed = getattr(sys.modules.get("torch"), "distributed", None)
    if distributed and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()
