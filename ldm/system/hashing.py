"""What a folder must hold, said by itself: manifest.json lists every file with its size and SHA-256.

{"format": 1, "files": {"state.json": {"size": 2101, "sha256": "9f2c…"}, …}}
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

NAME = "manifest.json"
FORMAT = 1


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_manifest(folder: Path) -> None:
    """List the files of a folder in its manifest.json."""
    files = {path.name: {"size": path.stat().st_size, "sha256": sha256(path)} for path in sorted(folder.iterdir())}
    (folder / NAME).write_text(json.dumps({"format": FORMAT, "files": files}, indent=2) + "\n", "utf-8")


def fault(folder: Path) -> str | None:
    """What is wrong with a folder that has a manifest, in words; None if every file is as it was written."""
    try:
        manifest = json.loads((folder / NAME).read_text("utf-8"))
        if manifest["format"] != FORMAT:
            return f"{NAME} has format {manifest['format']!r}, expected {FORMAT}"
        listed = {str(name): (entry["size"], entry["sha256"]) for name, entry in manifest["files"].items()}
    except OSError as error:
        return f"{NAME} can't be read: {error.strerror}"
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{NAME} is damaged: {type(error).__name__}: {error}"
    if not listed:
        return f"{NAME} lists no file"
    for name, (size, digest) in listed.items():
        path = folder / name
        try:
            found = path.stat().st_size
            if found != size:
                return f"{name} has {found} bytes, expected {size}"
            if sha256(path) != digest:
                return f"{name} has other content than was written (SHA-256)"
        except (OSError, ValueError) as error:
            return f"{name} can't be read: {getattr(error, 'strerror', error)}"
    return None
