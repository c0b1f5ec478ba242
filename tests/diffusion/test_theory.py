"""docs/theory.md says what the code says: the lines it quotes, the tests it names, the numbers it shows."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from test_guidance import solved, tilted
from test_mutations import FAULTS

ROOT = Path(__file__).parents[2]
THEORY = (ROOT / "docs" / "theory.md").read_text(encoding="utf-8")
QUOTES = re.findall(r"```python\n# (\S+)::(\S+)\n(.*?)```", THEORY, re.DOTALL)
TESTS = sorted(set(re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", THEORY)))
MODULES = sorted((ROOT / "ldm" / "diffusion").glob("*.py"))


def definition(path: str, name: str) -> str | None:
    """The source of a function, class or method; None if there is none."""
    source = (ROOT / path).read_text(encoding="utf-8")
    node: ast.Module | ast.FunctionDef | ast.ClassDef = ast.parse(source)
    for part in name.split("."):
        found = [n for n in node.body if isinstance(n, ast.FunctionDef | ast.ClassDef) and n.name == part]
        if not found:
            return None
        node = found[0]
    assert isinstance(node, ast.FunctionDef | ast.ClassDef)
    return "\n".join(source.splitlines()[node.lineno - 1 : node.end_lineno])


@pytest.mark.parametrize("path, name, quoted", QUOTES, ids=[f"{p}::{n}" for p, n, _ in QUOTES])
def test_quoted_lines_are_the_code(path: str, name: str, quoted: str) -> None:
    source = definition(path, name)
    assert source is not None, f"{path} has no {name}"
    lines = {line.strip() for line in source.splitlines()}
    for line in quoted.strip().splitlines():
        assert line.strip() in lines, f"{path}::{name} has no line {line.strip()!r}"


def test_every_code_block_says_where_it_is_from() -> None:
    assert len(QUOTES) == THEORY.count("```python") > 20


@pytest.mark.parametrize("path, name", TESTS, ids=[name for _, name in TESTS])
def test_named_tests_exist(path: str, name: str) -> None:
    assert definition(path, name) is not None, f"{path} has no {name}"


def test_what_is_counted() -> None:
    assert "ten files of plain tensors" in THEORY and len(MODULES) - 1 == 10  # __init__ holds words only
    assert "some sixty small faults" in THEORY and 55 <= len(FAULTS) <= 65


def test_links_lead_somewhere() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", THEORY)
    assert links and all((ROOT / "docs" / link).exists() for link in links)
    headings = {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in re.findall(r"^#+ (.*)$", THEORY, re.M)}
    anchors = re.findall(r"\]\(#([^)]+)\)", THEORY)
    assert anchors and set(anchors) <= headings


@pytest.mark.parametrize("module", MODULES, ids=lambda m: m.stem)
def test_every_public_function_has_its_place(module: Path) -> None:
    """What the module defines, the page explains, or at least names."""
    for node in ast.parse(module.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            assert re.search(rf"[`:.]{node.name}[`.\n]", THEORY), (
                f"theory.md doesn't mention {module.name}::{node.name}"
            )


def test_the_guidance_table_is_computed() -> None:
    rows = re.findall(r"^\| ([\d.]+) \| (-?[\d.]+) \| ([\d.]+) \| (-?[\d.]+) \| ([\d.]+) \|$", THEORY, re.M)
    assert [row[0] for row in rows] == ["0", "1", "1.5", "2", "3", "7.5"]
    for scale, *numbers in rows:
        computed = (*solved(float(scale)), *tilted(float(scale)))
        assert numbers == [f"{abs(n) if abs(n) < 5e-4 else n:.3f}" for n in computed]
    assert tilted(7.5)[1] / solved(7.5)[1] == pytest.approx(37, abs=0.5)
