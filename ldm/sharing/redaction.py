"""Redaction: paths of this machine leave what is shared; only their last names stay.

    /home/ada/runs/demo/pipeline          =>  demo/pipeline     (/home/ada/runs/demo is a known folder)
    ldm evaluate x --net '/home/ada/a b'  =>  ldm evaluate x --net 'a b'

Paths below the working folder, such as runs/demo, stay as they are.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import PurePath, PurePosixPath, PureWindowsPath
from typing import Any

CAPTION_KEYS = frozenset({"caption", "prompt", "prompts"})  # their values stay, whatever they look like
ROOT = r"(?:~[\w.-]*|\.\.?|[A-Za-z]:)?[/\\]"  # start of a path outside the working folder
BEFORE = r"(?<![^\s'\"=(\[{,:])"
QUOTED = re.compile(rf"(?P<quote>['\"])(?P<path>{ROOT}[^'\"]*)(?P=quote)")
BARE = re.compile(rf"{BEFORE}{ROOT}[^\s'\"/\\,:()\[\]{{}}]+(?:[/\\]+[^\s'\"/\\,:()\[\]{{}}]+)*[/\\]?")
WHOLE = re.compile(rf"{ROOT}.*")


def is_outside(path: Any) -> bool:
    """Whether it is a path that is not below the working folder."""
    return isinstance(path, str) and WHOLE.fullmatch(path) is not None


def redact_paths(tree: Any, known: Iterable[Any] = ()) -> Any:
    """The same JSON tree, with every path outside the working folder replaced by its last name.

    Args:
        tree: the content of a JSON file; captions and prompts in it are not changed.
        known: folders below which paths keep their relative part: /a/b/c/d below /a/b => b/c/d. Folders inside the
            working folder are ignored.
    """
    folders = sorted({str(path).rstrip("/\\") for path in known if is_outside(path)}, key=len, reverse=True)
    after = r"(?:[/\\]+$)?(?![^\s'\"/\\,:()])"
    return _redact(tree, [(re.compile(BEFORE + re.escape(path) + after), path) for path in folders])


def _redact(tree: Any, known: list[tuple[re.Pattern[str], str]]) -> Any:
    if isinstance(tree, dict):
        return {key: value if key in CAPTION_KEYS else _redact(value, known) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [_redact(value, known) for value in tree]
    if not isinstance(tree, str):
        return tree
    for pattern, path in known:
        tree = pattern.sub(last_name(path).replace("\\", r"\\"), tree)
    if is_outside(tree):
        return last_name(tree)
    tree = QUOTED.sub(lambda found: found["quote"] + last_name(found["path"]) + found["quote"], tree)
    return BARE.sub(lambda found: last_name(found[0]), tree)


def last_name(path: str) -> str:
    """The last part of a POSIX or Windows path."""
    kind: type[PurePath] = PureWindowsPath if "\\" in path else PurePosixPath
    return kind(path).name
