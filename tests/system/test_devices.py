"""bf16 is for CPUs that multiply it faster, which their flags don't tell."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState

from ldm.system import devices
from ldm.training.config import LoopConfig
from ldm.training.distributed import build_accelerator, choose_precision, encoding_dtype

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def asked_anew() -> Iterator[None]:
    devices.cpu_is_faster_in_bf16.cache_clear()
    yield
    devices.cpu_is_faster_in_bf16.cache_clear()


def flagged(monkeypatch: pytest.MonkeyPatch, flags: str) -> None:
    """Let the machine say that its CPU has these flags."""
    real = Path.read_text

    def read(self: Path, *words: Any, **named: Any) -> str:
        return f"flags\t\t: fpu {flags} sse\n" if str(self) == "/proc/cpuinfo" else real(self, *words, **named)

    monkeypatch.setattr(Path, "read_text", read)


@pytest.mark.parametrize(
    ("flags", "gain", "expected"),
    [
        ("avx512_bf16", 2.0, True),
        ("avx512_bf16 amx_bf16", 6.0, True),
        ("avx512_bf16", 0.52, False),  # a Xeon whose AMX is switched off
        ("avx512_bf16", 1.1, False),
        ("avx2", 2.0, False),
    ],
)
def test_flags_and_a_measured_gain_decide(
    monkeypatch: pytest.MonkeyPatch, flags: str, gain: float, expected: bool
) -> None:
    flagged(monkeypatch, flags)
    monkeypatch.setattr(devices, "bf16_gain", lambda: gain)
    assert devices.cpu_is_faster_in_bf16() is expected
    assert devices.best_dtype(CPU) == (torch.bfloat16 if expected else torch.float32)
    assert choose_precision("auto", CPU) == ("bf16" if expected else "no")
    assert (choose_precision("bf16", CPU), choose_precision("fp32", CPU)) == ("bf16", "no")  # who asks gets it


def test_it_is_measured_once_in_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    flagged(monkeypatch, "avx512_bf16")
    measured: list[float] = []
    monkeypatch.setattr(devices, "bf16_gain", lambda: measured.append(0.5) or 0.5)
    assert not any(devices.cpu_is_faster_in_bf16() for _ in range(3)) and len(measured) == 1


def test_a_run_encodes_in_what_was_found(monkeypatch: pytest.MonkeyPatch) -> None:
    for found, expected in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr("ldm.training.distributed.cpu_is_faster_in_bf16", lambda found=found: found)
        monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
        AcceleratorState._reset_state(True)
        try:
            assert encoding_dtype(build_accelerator(LoopConfig(threads=1))) == expected
        finally:
            AcceleratorState._reset_state(True)


def test_the_gain_is_that_of_a_convolution_as_well() -> None:
    """Another operation, another size, timed by itself: it agrees about which is faster, where that is plain."""
    kinds = (torch.float32, torch.bfloat16)
    convolutions = {kind: torch.nn.Conv2d(128, 128, 3, padding=1).to(kind) for kind in kinds}
    pictures = {kind: torch.rand(8, 128, 16, 16).to(kind) for kind in kinds}
    seconds: dict[torch.dtype, list[float]] = {kind: [] for kind in kinds}
    with torch.no_grad():
        for kind in kinds * 10:
            started = time.perf_counter()
            convolutions[kind](pictures[kind])
            seconds[kind].append(time.perf_counter() - started)
    gain, other = devices.bf16_gain(), min(seconds[torch.float32]) / min(seconds[torch.bfloat16])
    assert gain > 0
    if not 0.7 < gain < 1.5:  # else neither is plainly faster
        assert (gain > 1) == (other > 0.9), (gain, other)
