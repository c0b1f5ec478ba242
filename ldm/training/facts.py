"""What a run has found out, remembered in RUN/facts.json with a stamp of what it depends on.

A resumed run neither hashes weights again nor saves and exports again what is there: all of it is looked up here. It
saves time alone: without the file, everything is computed anew.
"""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path
from typing import Any

from accelerate import PartialState

from ldm.data.rows import file_stamp

SETTLED = 2.0  # seconds; a file that changed within them may change again without a new time


class RunFacts:
    """Values by name, each valid while its stamp stays the same. Rank 0 writes."""

    def __init__(self, run: str | Path) -> None:
        self.file = Path(run) / "facts.json"

    def recall(self, name: str, stamp: str) -> Any:
        """The value of a name, None if there is none or its stamp was another."""
        entry = self._read().get(name)
        return entry.get("value") if isinstance(entry, dict) and entry.get("stamp") == stamp else None

    def keep(self, name: str, stamp: str, value: Any) -> None:
        """Remember a value as JSON holds it; an empty stamp is not remembered."""
        if not stamp or not PartialState().is_main_process:
            return
        new = self.file.with_name(f".{self.file.name}.new")
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            new.write_text(
                json.dumps(self._read() | {name: {"stamp": stamp, "value": value}}, indent=2) + "\n", "utf-8"
            )
            new.rename(self.file)
        except OSError:
            new.unlink(missing_ok=True)

    def _read(self) -> dict[str, Any]:
        try:
            found = json.loads(self.file.read_text("utf-8"))
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}


def stamp(*facts: Any) -> str:
    """One text that differs if any of these facts does."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


def folder_stamp(folder: Path) -> str:
    """A text that differs if any file in a folder does; empty if one has only just changed."""
    found = [file_stamp(str(path)) for path in sorted(folder.rglob("*")) if path.is_file()]
    settled = not found or time.time() - max(changed for _, changed in found) >= SETTLED
    return stamp([text for text, _ in found]) if settled else ""


def written_stamp(folder: Path) -> str:
    """The same for a folder whose files get more names (hard links), which changes the time of their last change."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return stamp(
        [[str(path.relative_to(folder)), (s := path.stat()).st_size, s.st_mtime_ns, s.st_ino] for path in files]
    )
