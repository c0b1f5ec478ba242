"""The maps at the heads of the packages name what is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import road

ROOMS = [path.parent for path in sorted((road.ROOT / "ldm").rglob("__init__.py"))]


@pytest.mark.parametrize("room", ROOMS, ids=lambda room: room.name)
def test_a_package_says_what_each_of_its_files_is_for(room: Path) -> None:
    told = (room / "__init__.py").read_text("utf-8").split('"""')[1]
    bare = r"^    (\w+)  " if room.name == "diffusion" else r"\b(\w+)\.py\b"
    assert set(re.findall(bare, told, re.MULTILINE)) == {path.stem for path in room.glob("[!_]*.py")}
    packages = {path.parent.name for path in room.glob("*/__init__.py")}
    assert set(re.findall(r"^(\w+)/", told, re.MULTILINE)) == packages


def test_the_root_is_empty_but_for_packages() -> None:
    root = road.ROOT / "ldm"
    assert {path.name for path in root.iterdir() if path.is_file()} == {"__init__.py", "version.py", "py.typed"}


def test_files_of_tests_have_names_of_their_own() -> None:
    """pytest imports them by their base names, and stops at the second of a name."""
    names = [path.name for path in (road.ROOT / "tests").rglob("test_*.py")]
    assert sorted(names) == sorted(set(names))
