"""Processes that torchrun starts again, beside the store that it keeps."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from datetime import timedelta

import pytest
from torch.distributed import HashStore, TCPStore  # type: ignore[attr-defined]

from ldm.training.rendezvous import agree, group_settings

RANK = """
import os, time
import torch
from torch import distributed
from ldm.training.rendezvous import group_settings

time.sleep(float(os.environ["DELAY"]))
distributed.init_process_group("gloo", **(group_settings() if os.environ["FRESH"] == "1" else {}))
total = torch.tensor([float(distributed.get_rank() + 1)])
distributed.all_reduce(total)
print(distributed.get_world_size(), float(total))
os._exit(0)
"""


def start(store: TCPStore, delays: Sequence[float], fresh: bool, patient: bool = True) -> list[tuple[int | None, str]]:
    """One start of two processes, as torchrun makes it: exit codes, None if they wait in vain, and what they print."""
    ranks = []
    for rank, delay in enumerate(delays):
        words = {
            "RANK": rank, "WORLD_SIZE": len(delays), "MASTER_ADDR": "localhost", "MASTER_PORT": store.port,
            "TORCHELASTIC_USE_AGENT_STORE": True, "DELAY": delay, "FRESH": int(fresh),
        }  # fmt: skip
        environment = {**os.environ, **{name: str(word) for name, word in words.items()}}
        ranks.append(subprocess.Popen([sys.executable, "-c", RANK], env=environment, stdout=-1, stderr=-3, text=True))
    ended: list[tuple[int | None, str]] = []
    for process in ranks:
        try:
            said, _ = process.communicate(timeout=60 if patient else 8)
            ended.append((process.returncode, said.strip()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            ended.append((None, ""))
    return ended


def test_restarted_processes_meet_each_other_and_not_the_dead() -> None:
    """The store has the addresses of the first start, and rank 0 is late; plain torch reads what is stale.

    If the last line fails, torch has learned it, and ldm/training/rendezvous.py can go.
    """
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    good = [(0, "2 3.0")] * 2
    assert start(store, (0, 0), fresh=False) == good
    assert start(store, (2, 0), fresh=True) == good
    assert start(store, (2, 0), fresh=False, patient=False) != good


@pytest.mark.parametrize("late", range(3))
def test_one_start_one_name(late: int) -> None:
    """Whoever comes last, among greetings, answers and names of earlier starts."""
    store, names = HashStore(), list[set[str]]()

    def rank(number: int, found: set[str]) -> None:
        time.sleep(0.3 * (number == late))
        found.add(agree(store, number, 3, timedelta(seconds=10)))

    for _ in range(3):
        found: set[str] = set()
        threads = [threading.Thread(target=rank, args=(number, found)) for number in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        names.append(found)
    assert [len(found) for found in names] == [1, 1, 1] and len(set.union(*names)) == 3


def test_a_rank_that_never_comes_is_named() -> None:
    with pytest.raises(TimeoutError, match=r"ranks \[1, 2\] did not start within 0:00:00.2"):
        agree(HashStore(), 0, 3, timedelta(seconds=0.2))


@pytest.mark.parametrize(
    "words", [{}, {"WORLD_SIZE": "1", "TORCHELASTIC_USE_AGENT_STORE": "True"}, {"WORLD_SIZE": "2"}]
)
def test_without_a_store_that_outlives_them_nothing_changes(words: dict[str, str]) -> None:
    assert group_settings(words) == {}
