"""A fresh start for processes that torchrun started again.

torchrun keeps one store for all its restarts. What the lost processes wrote there, such as the addresses at which they
could be reached, is there still: a process that reads it before the new one has overwritten it waits for the dead, or
is refused. So the processes of a start first agree on a name that no start before had, and meet under it.
"""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

from torch.distributed import PrefixStore, Store, TCPStore, is_initialized  # type: ignore[attr-defined]

TIMEOUT = timedelta(minutes=30)  # as torch has it for groups; nodes may start minutes apart
POLL = 0.05  # seconds


def group_settings(environment: Mapping[str, str] = os.environ) -> dict[str, Any]:
    """Arguments of `torch.distributed.init_process_group`; none where no store outlives the processes, or it is done.

    Every rank must call it.

    Raises:
        TimeoutError: if not all processes come.
    """
    rank, processes = int(environment.get("RANK", 0)), int(environment.get("WORLD_SIZE", 1))
    if processes == 1 or environment.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or is_initialized():
        return {}
    host, port = environment["MASTER_ADDR"], int(environment["MASTER_PORT"])
    store = TCPStore(host, port, processes, is_master=False, timeout=TIMEOUT)
    return {"store": PrefixStore(agree(store, rank, processes), store), "rank": rank, "world_size": processes}


def agree(store: Store, rank: int, processes: int, timeout: timedelta = TIMEOUT) -> str:
    """The name of this start, the same for all its processes, and for no other start's.

    A greeting in the store may be of a dead process. So rank 0 answers each under the name that stands in it, and goes
    on until all ranks of its own start have confirmed.
    """
    mine = uuid.uuid4().hex
    if rank:
        store.set(f"greeting/{rank}", mine)
        store.wait([f"answer/{mine}"], timeout)
        name = store.get(f"answer/{mine}").decode()
        store.set(f"{name}/confirmed/{rank}", "")
        return name
    missing, end = set(range(1, processes)), time.monotonic() + timeout.total_seconds()
    while missing:
        for other in sorted(missing):
            if store.check([f"greeting/{other}"]):
                store.set(f"answer/{store.get(f'greeting/{other}').decode()}", mine)
            if store.check([f"{mine}/confirmed/{other}"]):
                missing.remove(other)
        if time.monotonic() > end:
            raise TimeoutError(f"ranks {sorted(missing)} did not start within {timeout}")
        time.sleep(POLL)
    return mine
