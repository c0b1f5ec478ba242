"""What must never be in this repository: ways to read a file that run the code inside it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import road

MODULES = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
CALLS = {"torch.load", "pandas.read_pickle", "pd.read_pickle"}
METHODS = {"register_for_checkpointing", "load_state", "read_pickle"}
ARGUMENTS = {"weights_only": False, "allow_pickle": True, "trust_remote_code": True, "use_safetensors": False}
SOURCES = [path for folder in ("ldm", "train", "benchmarks") for path in (road.ROOT / folder).rglob("*.py")]


def forbidden(source: str) -> list[str]:
    """What is in this source that must not be, with its line."""
    found = []
    for node in ast.walk(ast.parse(source)):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.split(".")[0] in MODULES]
        elif isinstance(node, ast.ImportFrom):
            whole = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name for name in whole if name.split(".")[0] in MODULES or name in CALLS]
        elif isinstance(node, ast.Attribute):
            names = [name for name in [ast.unparse(node)] if name in CALLS or node.attr in METHODS]
        elif isinstance(node, ast.keyword):
            value = node.value
            banned = isinstance(value, ast.Constant) and ARGUMENTS.get(node.arg or "", ...) is value.value
            names = [f"{node.arg}={ast.unparse(value)}"] if banned else []
        found += [f"line {getattr(node, 'lineno', '?')}: {name}" for name in names]
    return found


@pytest.mark.parametrize("path", [*SOURCES, road.ROOT / "app.py"], ids=lambda path: str(path.relative_to(road.ROOT)))
def test_nothing_is_read_that_can_run_code(path: Path) -> None:
    assert not forbidden(path.read_text("utf-8"))


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "import os, pickle as p",
        "from pickle import loads",
        "from torch import load",
        "import torch\ntorch.load('a')",
        "accelerator.register_for_checkpointing(x)",
        "accelerator.load_state(x)",
        "read(x, weights_only=False)",
        "np.load(x, allow_pickle=True)",
        "Model.from_pretrained(x, use_safetensors=False)",
        "Model.from_pretrained(x, trust_remote_code=True)",
    ],
)
def test_each_way_is_found(source: str) -> None:
    assert forbidden(source)


def test_what_is_safe_is_let_through() -> None:
    assert not forbidden("import torch, json\ntorch.save(a, b)\nload_file(x)\nread(weights_only=True)\n'torch.load'")
