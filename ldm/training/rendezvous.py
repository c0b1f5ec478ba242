"""A fresh start for processes that torchrun started again.

torchrun keeps one store for all its restarts, with what dead processes wrote into it. A new process may read a dead
one's address there. It then waits in vain, or is refused. So the processes of a start first agree on a name that no
start before had, and meet under it.
"""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

from torch.distributed import PrefixStore, Store, TCPStore, is_initialized  # type: ignore[attr-defined]

TIMEOUT = timedelta(minutes=30)  # nodes may start minutes apart
POLL = 0.05  # seconds; a signal is answered in between


def group_settings(environment: Mapping[str, str] = os.environ) -> dict[str, Any]:
    """Arguments of `torch.distributed.init_process_group`: empty if no store outlives the processes, or they have met.

    DeepSpeed takes no store, so it meets as before. Every rank must call it.

    Raises:
        TimeoutError: if not all processes come.
    """
    rank, processes = int(environment.get("RANK", 0)), int(environment.get("WORLD_SIZE", 1))
    if processes == 1 or environment.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or is_initialized():
        return {}
    if environment.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true":
        return {}
    host, port = environment["MASTER_ADDR"], int(environment["MASTER_PORT"])
    store = TCPStore(host, port, processes, is_master=False, timeout=TIMEOUT)
    return {"store": PrefixStore(agree(store, rank, processes), store), "rank": rank, "world_size": processes}


def agree(store: Store, rank: int, processes: int, timeout: timedelta = TIMEOUT) -> str:
    """The name of this start, the same for all its processes, and for no other start's.

    A greeting in the store may be of a dead process. So rank 0 answers every greeting, and goes on until those that
    stand there have all been confirmed.

    Raises:
        TimeoutError: if not all processes come.
    """
    mine, end = uuid.uuid4().hex, time.monotonic() + timeout.total_seconds()

    def read(key: str) -> str | None:
        return store.get(key).decode() if store.check([key]) else None

    if rank:
        store.set(f"greeting/{rank}", mine)
        while (name := read(f"answer/{mine}")) is None:
            if time.monotonic() > end:
                raise TimeoutError(f"rank 0 did not start within {timeout}")
            time.sleep(POLL)
        store.set(f"{name}/confirmed/{mine}", "")
        return name
    while True:
        greetings = {other: read(f"greeting/{other}") for other in range(1, processes)}
        for greeting in filter(None, greetings.values()):
            store.set(f"answer/{greeting}", mine)
        missing = [other for other, one in greetings.items() if not one or read(f"{mine}/confirmed/{one}") is None]
        if not missing:
            return mine
        if time.monotonic() > end:
            raise TimeoutError(f"ranks {missing} did not start within {timeout}")
        time.sleep(POLL)
