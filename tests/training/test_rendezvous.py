"""Processes that torchrun starts again, beside the store that it keeps."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from datetime import timedelta

import pytest
from torch.distributed import HashStore, TCPStore, rendezvous  # type: ignore[attr-defined]

from ldm.training.rendezvous import agree, group_settings

#: A rank. Rank 0 of a start that is late comes a second after rank 1 began to look for it.
RANK = """
import os, time
import torch
from torch import distributed
from ldm.training.config import LoopConfig
from ldm.training.distributed import build_accelerator

store = distributed.TCPStore("localhost", int(os.environ["MASTER_PORT"]), 2, is_master=False)
if os.environ["RANK"] == "1":
    store.set(os.environ["START"], "")
elif os.environ["LATE"] == "1":
    store.wait([os.environ["START"]])
    time.sleep(1)
if os.environ["FRESH"] == "1":
    build_accelerator(LoopConfig(threads=1, precision="fp32"))
else:
    distributed.init_process_group("gloo")
total = torch.tensor([float(distributed.get_rank() + 1)])
distributed.all_reduce(total)
print(distributed.get_world_size(), float(total), flush=True)
os._exit(0)
"""
GOOD = [(0, "2 3.0")] * 2


def start(store: TCPStore, name: str, fresh: bool, late: bool) -> list[tuple[int, str]]:
    """One start of two processes, as torchrun makes it: exit codes, and what they print."""
    ranks = []
    for rank in range(2):
        words: Mapping[str, object] = {
            "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_ADDR": "localhost",
            "MASTER_PORT": store.port, "TORCHELASTIC_USE_AGENT_STORE": True, "ACCELERATE_USE_CPU": "true",
            "START": name, "FRESH": int(fresh), "LATE": int(late),
        }  # fmt: skip
        environment = {**os.environ, **{key: str(word) for key, word in words.items()}}
        ranks.append(subprocess.Popen([sys.executable, "-c", RANK], env=environment, stdout=-1, stderr=-3, text=True))
    store.wait([name], timedelta(seconds=60))
    try:
        said = [process.communicate(timeout=120)[0].strip() for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    return [(process.returncode, words) for process, words in zip(ranks, said, strict=True)]


def test_restarted_processes_meet_each_other_and_not_the_dead() -> None:
    """The store has the addresses of the first start, and rank 0 is late."""
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    assert start(store, "first", fresh=False, late=False) == GOOD
    assert start(store, "second", fresh=True, late=True) == GOOD


def test_torch_itself_reads_what_an_earlier_start_wrote(monkeypatch: pytest.MonkeyPatch) -> None:
    """If this fails, torch has learned it, and ldm/training/rendezvous.py can go."""
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    store.set("address", "of a dead process")
    for name, word in {"MASTER_ADDR": "localhost", "MASTER_PORT": store.port, "RANK": 1, "WORLD_SIZE": 2,
                       "TORCHELASTIC_USE_AGENT_STORE": True, "TORCHELASTIC_RESTART_COUNT": 1}.items():  # fmt: skip
        monkeypatch.setenv(name, str(word))
    found, *_ = next(iter(rendezvous("env://")))
    assert found.get("address") == b"of a dead process"


@pytest.mark.parametrize("late", range(3))
def test_one_start_one_name(late: int) -> None:
    """Whoever comes last, among greetings, answers and names of earlier starts, and of one that nobody answered."""
    store, names = HashStore(), list[set[str]]()

    def rank(number: int, found: list[str]) -> None:
        time.sleep(0.3 * (number == late))
        found.append(agree(store, number, 3, timedelta(seconds=10)))

    with pytest.raises(TimeoutError, match=r"rank 0 did not start within 0:00:00.1"):
        agree(store, 2, 3, timedelta(seconds=0.1))
    for _ in range(3):
        found: list[str] = []
        threads = [threading.Thread(target=rank, args=(number, found)) for number in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        assert len(found) == 3, "a rank never ended, or failed"
        names.append(set(found))
    assert [len(found) for found in names] == [1, 1, 1] and len(set.union(*names)) == 3


def test_the_successor_of_a_rank_that_confirmed_is_answered() -> None:
    """Rank 1 confirms and dies while rank 0 waits for rank 2: another process takes its place."""
    store, found = HashStore(), list[str]()
    waiting = threading.Thread(target=lambda: found.append(agree(store, 0, 3, timedelta(seconds=10))))
    waiting.start()
    lost = agree(store, 1, 3, timedelta(seconds=10))
    time.sleep(0.2)
    names = [agree(store, rank, 3, timedelta(seconds=10)) for rank in (1, 2)]
    waiting.join(20)
    assert [lost, *names] == found * 3


def test_a_rank_that_never_comes_is_named() -> None:
    with pytest.raises(TimeoutError, match=r"ranks \[1, 2\] did not start within 0:00:00.2"):
        agree(HashStore(), 0, 3, timedelta(seconds=0.2))


@pytest.mark.parametrize(
    "words",
    [{}, {"WORLD_SIZE": "1", "TORCHELASTIC_USE_AGENT_STORE": "True"}, {"WORLD_SIZE": "2"},
     {"WORLD_SIZE": "2", "TORCHELASTIC_USE_AGENT_STORE": "True", "ACCELERATE_USE_DEEPSPEED": "true"}],
)  # fmt: skip
def test_without_a_store_that_outlives_them_nothing_changes(words: dict[str, str]) -> None:
    assert group_settings(words) == {}
