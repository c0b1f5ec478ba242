"""What every test shares: no network, one thread, and tiny pipelines made once."""

from __future__ import annotations

import os
from pathlib import Path

# subprocesses inherit these; one thread because toy networks are slower with two, and sums keep their order
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import tiny


@pytest.fixture(scope="session")
def tiny_pipeline_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[tiny.Kind, Path]:
    """A saved pipeline for each kind of text encoder."""
    folder = tmp_path_factory.mktemp("tiny")
    for kind in tiny.KINDS:
        tiny.pipeline(folder / f"{kind}-encoder", kind).save_pretrained(folder / kind)
    return {kind: folder / kind for kind in tiny.KINDS}


@pytest.fixture(scope="session")
def tiny_pipeline_folder(tiny_pipeline_folders: dict[tiny.Kind, Path]) -> Path:
    """A saved pipeline with a BERT encoder, the default kind."""
    return tiny_pipeline_folders["bert"]
