"""What one step frees, the next one needs: the C library may keep it instead of giving it back to the system.

glibc gives the top of its heap back as soon as 64 MB of it are free, and a training step on a CPU frees hundreds: the
system then hands out and zeroes the same pages for the next one, up to a fifth of its time (docs/experiments.md, 22).
Elsewhere than on glibc, the one function does nothing and the other what Python and torch can.
"""

from __future__ import annotations

import ctypes
import resource
import sys
from functools import cache
from pathlib import Path
from typing import Any

# of malloc.h
M_TRIM_THRESHOLD = -1
M_MMAP_THRESHOLD = -3
LARGE = 2**30  # bytes; what is larger comes from the system and goes back to it
LARGE_BEFORE_2_35 = 2**25  # the most that older versions take


@cache
def libc() -> Any:
    """The process's C library if it is glibc, else None."""
    try:
        library = ctypes.CDLL(None)
        return library if hasattr(library, "gnu_get_libc_version") else None
    except (OSError, TypeError):  # Windows
        return None


def keep_freed_memory() -> None:
    """From now on, what this process frees stays its own, until `give_back`."""
    library = libc()
    if library is None:
        return
    if not library.mallopt(M_MMAP_THRESHOLD, LARGE):
        library.mallopt(M_MMAP_THRESHOLD, LARGE_BEFORE_2_35)
    library.mallopt(M_TRIM_THRESHOLD, -1)  # never


def give_back() -> None:
    """Give all that is free now back to the system, a device's cache included: after something large that is over."""
    from accelerate.utils.memory import clear_device_cache  # torch with it, which `peak_bytes` doesn't need

    clear_device_cache(garbage_collection=True)
    library = libc()
    if library is not None:
        library.malloc_trim(0)


def peak_bytes() -> int:
    """The largest resident size of this process so far, without that of its workers.

    On Linux not getrusage's: a process that another one starts begins there with the peak of that one.
    """
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text("utf-8").splitlines())
        return int(lines["VmHWM"].split()[0]) * 1024
    except (OSError, KeyError):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
