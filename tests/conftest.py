"""What every test shares: no network, one thread, and tiny pipelines made once."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path

# subprocesses inherit these; one thread because toy networks are slower with two, and sums keep their order
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import tiny
import torch

#: The files that take longest. A file is run by one worker, so these begin first, or one worker waits for another.
LONGEST = (
    "test_training.py",
    "test_openvino.py",
    "test_faults.py",
    "test_lineage.py",
    "test_doctor.py",
    "test_second_device.py",
)


def pytest_collection_finish() -> None:
    """Let the garbage collector pass over what was imported: each export and each preview collects, 0.3 s a time."""
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in LONGEST)


@pytest.fixture(autouse=True)
def as_many_threads_as_before() -> Iterator[None]:
    """A training sets torch's threads for its process; on two, bf16 rounds otherwise than on one."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


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
