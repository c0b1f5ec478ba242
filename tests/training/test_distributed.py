"""Which precision a run computes in, as the recipe, `accelerate launch` and the machine say."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import road
from accelerate.state import AcceleratorState

from ldm.training.config import LoopConfig
from ldm.training.distributed import build_accelerator


@pytest.fixture
def fresh_accelerate() -> Iterator[None]:
    """Accelerate remembers device and precision for as long as a process lives."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.usefixtures("fresh_accelerate")
@pytest.mark.parametrize(
    ("launched", "wanted", "expected"),
    [("bf16", "auto", "bf16"), ("bf16", "bf16", "bf16"), ("no", "bf16", "bf16"), ("no", "fp32", "no"),
     (None, "fp32", "no"), ("fp16", "auto", r"loop\.precision: fp16 can't train on a CPU"),
     ("bf16", "fp32", r"loop\.precision: fp32 contradicts .* --mixed_precision bf16; set loop\.precision"),
     ("fp8", "auto", r"loop\.precision: auto contradicts .* --mixed_precision fp8; set loop\.precision")],
)  # fmt: skip
def test_what_accelerate_is_launched_with_is_obeyed_or_refused(
    monkeypatch: pytest.MonkeyPatch, launched: str | None, wanted: str, expected: str
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    if launched:
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launched)
    config = LoopConfig(precision=wanted, threads=1)  # type: ignore[arg-type]
    if expected in ("no", "bf16"):
        assert build_accelerator(config).mixed_precision == expected
        return
    with pytest.raises(ValueError, match=expected) as refused:
        build_accelerator(config)
    assert len(str(refused.value).splitlines()) == 1


def test_the_launcher_passes_it_on(tmp_path: Path) -> None:
    """The real `accelerate launch --mixed_precision bf16` with precision=auto, on a CPU that is slower in it, too."""
    road.draw_folder(tmp_path / "data")
    config = road.recipe(tmp_path, vae_training__steps=1, loop__precision="auto")
    said = road.launch("train_vae", road.save_recipe(config, tmp_path / "recipe.yaml"), precision="bf16")
    assert re.search(r"^VAE: .*, bf16 mixed precision on cpu$", said, re.M)
