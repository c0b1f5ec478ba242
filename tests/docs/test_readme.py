"""What the README tells people to type works as it stands."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import road
from PIL import Image

from ldm.cli.config import parse_config
from ldm.cli.main import build_parser

README = (road.ROOT / "README.md").read_text("utf-8")
COMMANDS = [
    shlex.split(line, comments=True)
    for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    for line in block.splitlines()
    if line.strip()
]
OVERRIDES = re.findall(r"^\| .*?\| `([a-z_.]+=[^`]+)`", README, re.MULTILINE)


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_command(words: list[str]) -> None:
    """Every command is one that its program understands."""
    if words[0] == "make":
        assert subprocess.run(["make", "--dry-run", *words[1:]], cwd=road.ROOT, capture_output=True).returncode == 0
    elif words[0] == "ldm":
        build_parser().parse_args(words[1:])
    elif words[:2] == ["accelerate", "launch"]:
        assert (road.ROOT / words[2]).exists()
        parse_config([str(road.ROOT / word) if word.startswith("configs/") else word for word in words[3:]])
    elif words[:2] == ["python", "app.py"]:
        helped = subprocess.run([sys.executable, "app.py", "--help"], cwd=road.ROOT, capture_output=True, text=True)
        assert helped.returncode == 0
        assert all(word in helped.stdout for word in words[2:] if word.startswith("--"))
    else:
        assert words[:3] == ["pip", "install", "-e"]
        extras = re.findall(r"\[(.*)\]", words[3])[0].split(",")
        assert all(f"\n{extra} = [" in (road.ROOT / "pyproject.toml").read_text("utf-8") for extra in extras)


def test_every_program_is_shown() -> None:
    assert {words[0] for words in COMMANDS} == {"make", "ldm", "python", "accelerate", "pip"}


@pytest.mark.parametrize("words", OVERRIDES)
def test_override_in_the_table(words: str) -> None:
    parse_config(["--config", str(road.ROOT / "configs/demo.yaml"), *words.split()])


def test_there_are_overrides_in_the_table() -> None:
    assert len(OVERRIDES) >= 5


def test_python_lines_draw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (lines,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").symlink_to(road.ROOT / "models")
    exec(lines, {})
    assert Image.open(tmp_path / "red_heart.png").size == (256, 256)


def test_links_and_pictures_exist() -> None:
    targets = re.findall(r"\]\((?!https?:)([^)#]+)\)", README)
    assert targets
    assert not [target for target in targets if not (road.ROOT / target).exists()]
