"""Where things lie on somebody's machine is nobody else's business: paths leave what is shared, their last names stay.

    /home/ada/runs/demo/pipeline          =>  demo/pipeline     (the run is known to be /home/ada/runs/demo)
    ldm evaluate x --net '/home/ada/a b'  =>  ldm evaluate x --net 'a b'

Paths below the working folder, such as runs/demo, stay as they are: they name what the commands name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import PurePath, PurePosixPath, PureWindowsPath
from typing import Any

WORDS = frozenset({"caption", "prompt", "prompts"})  # what people said of pictures, a path or not
ROOT = r"(?:~[\w.-]*|\.\.?|[A-Za-z]:)?[/\\]"  # of a path that isn't below the working folder
BEFORE = r"(?<![^\s'\"=(\[{,:])"
QUOTED = re.compile(rf"(?P<quote>['\"])(?P<path>{ROOT}[^'\"]*)(?P=quote)")
BARE = re.compile(rf"{BEFORE}{ROOT}[^\s'\"/\\,:()\[\]{{}}]+(?:[/\\]+[^\s'\"/\\,:()\[\]{{}}]+)*[/\\]?")
WHOLE = re.compile(rf"{ROOT}.*")


def is_far(path: Any) -> bool:
    """Whether it is the path of something that doesn't lie below the working folder."""
    return isinstance(path, str) and WHOLE.fullmatch(path) is not None


def without_places(tree: Any, known: Iterable[Any] = ()) -> Any:
    """The same JSON, every far path in it replaced by its last name.

    Args:
        tree: what a JSON file holds; captions and prompts in it are left alone.
        known: far paths (others are passed over) below which paths keep their end: /a/b/c/d below /a/b => b/c/d.
    """
    folders = sorted({str(path).rstrip("/\\") for path in known if is_far(path)}, key=len, reverse=True)
    after = r"(?:[/\\]+$)?(?![^\s'\"/\\,:()])"
    return _cleaned(tree, [(re.compile(BEFORE + re.escape(path) + after), path) for path in folders])


def _cleaned(tree: Any, known: list[tuple[re.Pattern[str], str]]) -> Any:
    if isinstance(tree, dict):
        return {key: value if key in WORDS else _cleaned(value, known) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [_cleaned(value, known) for value in tree]
    if not isinstance(tree, str):
        return tree
    for pattern, path in known:
        tree = pattern.sub(last_name(path).replace("\\", r"\\"), tree)
    if is_far(tree):
        return last_name(tree)
    tree = QUOTED.sub(lambda found: found["quote"] + last_name(found["path"]) + found["quote"], tree)
    return BARE.sub(lambda found: last_name(found[0]), tree)


def last_name(path: str) -> str:
    """The last part of a path of either kind."""
    kind: type[PurePath] = PureWindowsPath if "\\" in path else PurePosixPath
    return kind(path).name
