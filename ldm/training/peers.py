"""When a rank is lost, the others leave too, within seconds.

A rank that waits for a lost one may wait for minutes: NCCL until its timeout, gloo in some operations too. So every
rank watches the processes of the other ranks on its machine (a pidfd is readable once its process is gone, however it
went) and leaves if one of them goes before the end. Ranks on other machines are the launcher's business.
"""

from __future__ import annotations

import hashlib
import os
import select
import socket
import sys
import threading
import time
from types import TracebackType

import torch
from accelerate import Accelerator

EXIT_CODE = 76
GRACE = 4.0  # seconds for what is under way: an error that says more, a checkpoint that is nearly written


def machine() -> int:
    """A number for this machine and its process numbers: containers may share a host's name."""
    try:
        namespace = os.readlink("/proc/self/ns/pid")
    except OSError:
        namespace = ""
    return int.from_bytes(hashlib.sha256(f"{socket.gethostname()} {namespace}".encode()).digest()[:7], "little")


class Peers:
    """Watches the other ranks while it is open. Every rank must open it, and close it before the last barrier."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.closed = threading.Event()
        if accelerator.num_processes == 1 or not hasattr(os, "pidfd_open"):
            return
        mine = torch.tensor([[machine(), os.getpid()]], device=accelerator.device)
        everyone: list[list[int]] = accelerator.gather(mine).tolist()
        ranks = {pid: rank for rank, (where, pid) in enumerate(everyone) if where == machine() and pid != os.getpid()}
        threading.Thread(target=self.watch, args=(ranks,), daemon=True, name="peers").start()

    def watch(self, ranks: dict[int, int]) -> None:
        """Wait until one of these processes ends; leave unless it was time to."""
        poll, pid_of = select.poll(), {}
        for pid in ranks:
            try:
                descriptor = os.pidfd_open(pid)
            except ProcessLookupError:
                return self.leave(ranks[pid])
            except OSError:  # a system that has the call but doesn't allow it
                continue
            pid_of[descriptor] = pid
            poll.register(descriptor, select.POLLIN)
        while not self.closed.is_set():
            for descriptor, _ in poll.poll(500):
                return self.leave(ranks[pid_of[descriptor]])
        for descriptor in pid_of:
            os.close(descriptor)

    def leave(self, rank: int) -> None:
        """End this process, unless the run is over or ends by itself in the meantime."""
        time.sleep(GRACE)
        if not self.closed.is_set():
            print(f"error: rank {rank} is gone, so this one leaves; the same command goes on", file=sys.stderr)
            sys.stderr.flush()
            os._exit(EXIT_CODE)

    def close(self) -> None:
        """From now on the others may go."""
        self.closed.set()

    def __enter__(self) -> Peers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
