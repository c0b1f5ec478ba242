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
