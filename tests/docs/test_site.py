"""The site's hooks: links of README and docs/ work on the site; equations become MathML; API pages name real things."""

from __future__ import annotations

import ast
import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest
import road
import yaml

NAMES = [
    (page.name, name)
    for page in sorted((road.ROOT / "docs/api").glob("*.md"))
    for name in re.findall(r"^::: (\S+)", page.read_text("utf-8"), re.MULTILINE)
]


@pytest.fixture(scope="module")
def hooks() -> ModuleType:
    spec = importlib.util.spec_from_file_location("site_hooks", road.ROOT / "docs/site_hooks.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    "page, written, on_site",
    [
        ("index.md", "[a](docs/data.md)", "[a](data.md)"),
        ("index.md", "![a](docs/demo.png)", "![a](demo.png)"),
        ("index.md", "[a](benchmarks/README.md#method)", "[a](benchmarks.md#method)"),
        ("index.md", "[a](CONTRIBUTING.md)", "[a](contributing.md)"),
        ("theory.md", "[`x`](../ldm/diffusion)", "`x`"),
        ("theory.md", "[a](#8-guidance)", "[a](#8-guidance)"),
        ("evaluation.md", "[a](../models/emoji/report.html)", "[a](report.html)"),
        ("benchmarks.md", "[a](../docs/experiments.md)", "[a](experiments.md)"),
        ("api/data.md", "[a](../data.md)", "[a](../data.md)"),
        ("data.md", "[a](https://example.org/x.md)", "[a](https://example.org/x.md)"),
        ("data.md", "```bash\n[a](../x)\n```", "```bash\n[a](../x)\n```"),
    ],
)
def test_links(hooks: ModuleType, page: str, written: str, on_site: str) -> None:
    assert hooks.rewrite_links(written, page) == on_site


def test_equations(hooks: ModuleType) -> None:
    html = hooks.on_page_content(r'a <span class="arithmatex">\(x_t &lt; 1\)</span> b')
    assert "<msub><mi>x</mi><mi>t</mi></msub>" in html and "arithmatex" not in html


@pytest.mark.parametrize("page, name", NAMES)
def test_documented_name_exists(page: str, name: str) -> None:
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        module = road.ROOT.joinpath(*parts[:length])
        file = module / "__init__.py" if module.is_dir() else module.with_suffix(".py")
        if file.exists():
            defined = {getattr(node, "name", None) for node in ast.parse(file.read_text("utf-8")).body}
            assert set(parts[length:]) <= defined, f"docs/api/{page} names {name}"
            return
    raise AssertionError(f"docs/api/{page} names {name}")


def test_every_page_is_in_the_navigation() -> None:
    config = yaml.safe_load((road.ROOT / "mkdocs.yml").read_text("utf-8"))
    named = set(re.findall(r"[\w/]+\.md", yaml.safe_dump(config["nav"])))
    docs = road.ROOT / "docs"
    assert {str(page.relative_to(docs)) for page in docs.rglob("*.md")} <= named


def test_nothing_is_fetched() -> None:
    """Fonts and scripts come from the site itself."""
    text = (road.ROOT / "mkdocs.yml").read_text("utf-8")
    assert "font: false" in text and "http" not in text


def test_hooks_of_a_commit_run_what_ci_runs() -> None:
    (repository,) = yaml.safe_load(Path(road.ROOT / ".pre-commit-config.yaml").read_text("utf-8"))["repos"]
    lint = (road.ROOT / "Makefile").read_text("utf-8").split("lint:")[1]
    for hook in repository["hooks"]:
        assert hook["language"] == "system"
        assert " ".join(word for word in hook["entry"].split() if not word.startswith("--")) in lint
