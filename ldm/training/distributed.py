"""Devices and their precision, work that rank 0 does while the others wait, and ranks that died."""

from __future__ import annotations

import hashlib
import os
import select
import socket
import sys
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, Literal

import torch
import torch.distributed as distributed
from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast, broadcast_object_list

from ldm.system.devices import cpu_is_faster_in_bf16
from ldm.system.errors import RunError
from ldm.system.memory import keep_freed_memory
from ldm.training.config import LoopConfig
from ldm.training.rendezvous import group_settings

Precision = Literal["no", "bf16", "fp16"]


def build_accelerator(config: LoopConfig) -> Accelerator:
    """An Accelerator for the device it finds, with the config's precision and threads resolved for that device."""
    # with cpu=True accelerate makes torchrun's processes a gloo group; without, each would train alone
    cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true") or not torch.accelerator.is_available()
    state = PartialState(cpu=cpu, **group_settings())
    if cpu:
        # `accelerate launch` and `torchrun` set OMP_NUM_THREADS=1, which leaves all cores but one idle
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", state.num_processes))
        torch.set_num_threads(config.threads or max(1, usable_cores() // processes))
        keep_freed_memory()
    precision = choose_precision(launched_precision(config.precision), state.device)
    if cpu:  # where it was measured, by processes in each other's way
        [precision] = broadcast_object_list([precision])
    return Accelerator(cpu=cpu, mixed_precision=precision)


def encoding_dtype(accelerator: Accelerator) -> torch.dtype:
    """What VAE and text encoder encode in: bf16 where the run's steps multiply in it, else float32.

    Never fp16: what trained networks hold inside stays within its range only by luck (best_dtype).
    """
    return torch.bfloat16 if accelerator.mixed_precision == "bf16" else torch.float32


def usable_cores() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def launched_precision(wanted: str) -> str:
    """`loop.precision`, or for auto what `accelerate launch --mixed_precision` names.

    accelerate's "no" is its default, and decides nothing.

    Raises:
        ValueError: if the two contradict each other.
    """
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if launched in ("no", wanted):
        return wanted
    if wanted == "auto" and launched in ("bf16", "fp16"):
        return launched
    raise ValueError(
        f"loop.precision: {wanted} contradicts accelerate launch --mixed_precision {launched}; set loop.precision "
        "(auto, fp32, bf16 or fp16) and launch with --mixed_precision no"
    )


def choose_precision(wanted: str, device: torch.device) -> Precision:
    """`loop.precision` => accelerate's mixed_precision.

    auto is bf16 where the hardware multiplies it faster (on a CPU that is measured), else fp16 on older GPUs, else
    fp32.

    Raises:
        ValueError: for fp16 on a CPU, which can't train in it.
    """
    if wanted == "fp32":
        return "no"
    if wanted == "bf16":
        return "bf16"
    if wanted == "fp16":
        if device.type == "cpu":
            raise ValueError("loop.precision: fp16 can't train on a CPU; use bf16, fp32 or auto")
        return "fp16"
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability()[0] >= 8 else "fp16"
    if device.type == "cpu" and cpu_is_faster_in_bf16():
        return "bf16"
    return "no"


#: Process groups that were left, so that nothing destroys them before the process ends.
LEFT: list[Any] = []


def keep_group() -> None:
    """Keep the process group, if there is one, beyond its end.

    Its destructor holds Python's lock while it waits for its threads, and a thread that lets go of its last tensor
    waits for that lock. On a busy core one finished process in six hung so.
    """
    if distributed.is_available() and distributed.is_initialized():
        LEFT.append(distributed.group.WORLD)


def leave_group() -> None:
    """Leave the process group, if there is one."""
    if distributed.is_available() and distributed.is_initialized():
        keep_group()
        distributed.destroy_process_group()


TICK_SECONDS = 10.0  # far below the minutes after which NCCL and gloo give a silent process up
WAITING, FAILED = -1, -2
#: Called often during long work on rank 0, so that the other ranks know it is alive.
Tick = Callable[[], None]


def on_rank_0(work: Callable[[Tick], int | None]) -> int:
    """What `work` returns on rank 0, on every rank; it may take hours. Every rank must call it.

    A collective that isn't answered within minutes ends a run, so rank 0 answers one every few seconds.

    Args:
        work: returns a number from 0 up, None for 0; it gets a function to call often.
    Raises:
        RunError: on the other ranks, if the work failed.
    """
    state = PartialState()
    last = time.monotonic()

    def send(news: int) -> int:
        return int(broadcast(torch.tensor([news], device=state.device))[0])

    def tick() -> None:
        nonlocal last
        if time.monotonic() - last > TICK_SECONDS:
            last = time.monotonic()
            send(WAITING)

    if state.is_main_process:
        try:
            result = work(tick) or 0
        except Exception:  # not Ctrl-C, which ends the others, too
            send(FAILED)
            raise
        return send(result)
    while (news := send(WAITING)) == WAITING:
        pass
    if news == FAILED:
        raise RunError("rank 0 failed at what this process was waiting for; see its message")
    return news


EXIT_CODE = 76
GRACE = 4.0  # seconds for a more specific error, or a checkpoint that is nearly written


def machine() -> int:
    """A number for this machine and its process numbers: containers may share a host's name."""
    try:
        namespace = os.readlink("/proc/self/ns/pid")
    except OSError:
        namespace = ""
    return int.from_bytes(hashlib.sha256(f"{socket.gethostname()} {namespace}".encode()).digest()[:7], "little")


class Peers:
    """Watches the other ranks on this machine while open.

    Every rank must open it, and close it before the last barrier.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.closed = threading.Event()
        if accelerator.num_processes == 1 or not hasattr(os, "pidfd_open"):
            return
        mine = torch.tensor([[machine(), os.getpid()]], device=accelerator.device)
        everyone: list[list[int]] = accelerator.gather(mine).tolist()
        ranks = {pid: rank for rank, (where, pid) in enumerate(everyone) if where == machine() and pid != os.getpid()}
        threading.Thread(target=self.watch, args=(ranks,), daemon=True, name="peers").start()

    def watch(self, ranks: dict[int, int]) -> None:
        """Wait until one of these processes ends; exit, too, unless the run is over."""
        poll, pid_of = select.poll(), {}
        for pid in ranks:
            try:
                descriptor = os.pidfd_open(pid)
            except ProcessLookupError:
                return self.exit(ranks[pid])
            except OSError:  # a system that has the call but doesn't allow it
                continue
            pid_of[descriptor] = pid
            poll.register(descriptor, select.POLLIN)
        while not self.closed.is_set():
            for descriptor, _ in poll.poll(500):
                return self.exit(ranks[pid_of[descriptor]])
        for descriptor in pid_of:
            os.close(descriptor)

    def exit(self, rank: int) -> None:
        """Exit, unless the run is over or ends by itself in the meantime."""
        time.sleep(GRACE)
        if not self.closed.is_set():
            print(f"error: rank {rank} died, exiting; run the same command again to resume", file=sys.stderr)
            sys.stderr.flush()
            os._exit(EXIT_CODE)

    def close(self) -> None:
        """From now on the other ranks may end."""
        self.closed.set()

    def __enter__(self) -> Peers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
