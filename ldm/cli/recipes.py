"""The recipes that come with this package: in the wheel in ldm/configs, in the repository in configs."""

from __future__ import annotations

import os
from pathlib import Path

import ldm


def recipes() -> dict[str, Path]:
    """name => file."""
    root = Path(ldm.__file__).parent
    folder = root / "configs" if (root / "configs").is_dir() else root.parent / "configs"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def find_recipe(name: str) -> str:
    """A file as it is; the name of a recipe => its file.

    Raises:
        ValueError: for a name that is neither; lists the recipes.
    """
    file = os.path.expanduser(name)
    if os.path.exists(file) and not os.path.isdir(file):
        return file
    known = recipes()
    if name in known:
        return str(known[name])
    kind = "is a folder" if os.path.isdir(file) else "is neither a file nor a recipe"
    raise ValueError(f"--config: {name[:200]!r} {kind}; expected a YAML file, or one of {', '.join(known)}")
