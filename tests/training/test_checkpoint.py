"""Checkpoints: whole or absent, the newest ones kept, the same with sharded weights."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import road
import torch
from accelerate import Accelerator

from ldm.models.ema import averaged, build_ema
from ldm.system.errors import RunError
from ldm.training.checkpoint import checkpoints, load_checkpoint, save_checkpoint
from ldm.training.train_state import TrainState

SHARDED = """
import sys
import torch
import torch.distributed as dist
from pathlib import Path
from accelerate import Accelerator
from torch.distributed.fsdp import fully_shard
from ldm.models.ema import build_ema
from ldm.training.checkpoint import load_checkpoint, save_checkpoint
from ldm.training.optimizer import update, with_nan_gradients
from ldm.training.train_state import TrainState

def train_state(shard):
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 4))
    if shard:
        for layer in (net[0], net[2]):
            fully_shard(layer)
        fully_shard(net)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01, fused=True)
    return TrainState(net, optimizer, build_ema(net, 0.5))

def steps(t, first, last):
    losses = []
    for step in range(first, last):
        x = torch.randn(6, 8, generator=torch.Generator().manual_seed(step))
        loss = t.module(x).square().mean()
        losses.append(loss.item())
        if step in (1, 4):
            loss = loss + torch.inf  # of this loss the gradients are finite; the step must be skipped all the same
        with_nan_gradients(loss).backward()
        skipped = update(accelerator, t.module, t.optimizer, 0.01, 0.1)
        assert skipped.item() == (step in (1, 4))
        t.ema.step(t.module.parameters())
    return losses

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    accelerator = Accelerator(cpu=True)
    straight = steps(train_state(False), 0, 6)
    first = train_state(True)
    losses = steps(first, 0, 3)
    save_checkpoint(folder, 3, {}, {"net": first}, accelerator, keep=2)
    second = train_state(True)
    assert load_checkpoint(folder / "step_0000003", {"net": second}) == 3
    losses += steps(second, 3, 6)
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(straight), rtol=1e-5, atol=0)
    save_checkpoint(folder, 6, {}, {"net": second}, accelerator, keep=2)
    # and an unsharded network goes on from the sharded one's checkpoint
    whole = train_state(False)
    load_checkpoint(folder / "step_0000003", {"net": whole})
    torch.testing.assert_close(torch.tensor(steps(whole, 3, 6)), torch.tensor(straight[3:]), rtol=1e-5, atol=0)
    print(f"rank {accelerator.process_index} of {accelerator.num_processes} agrees")
    dist.destroy_process_group()
"""


def small() -> TrainState:
    torch.manual_seed(0)
    net = torch.nn.Linear(3, 2)
    state = TrainState(net, torch.optim.AdamW(net.parameters(), lr=0.1), build_ema(net, 0.9))
    for _ in range(2):
        net(torch.ones(1, 3)).sum().backward()
        state.optimizer.step()
    assert state.ema is not None
    state.ema.step(net.parameters())
    return state


def test_sharded_weights_make_the_same_checkpoint(tmp_path: Path) -> None:
    """torch's own fully_shard over two gloo processes, against one process that never stopped."""
    (tmp_path / "sharded.py").write_text(SHARDED)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*command, str(tmp_path / "sharded.py"), str(tmp_path / "checkpoints")],
        env={**os.environ, "PYTHONPATH": str(road.ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "rank 0 of 2 agrees" in done.stdout and "rank 1 of 2 agrees" in done.stdout


def test_the_newest_are_kept_and_nothing_half_written_counts(tmp_path: Path) -> None:
    accelerator, state = Accelerator(cpu=True), small()
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, step, {}, {"net": state}, accelerator, keep=2)
    (tmp_path / ".step_0000009.77").mkdir()  # what a killed process leaves behind
    assert [path.name for path in checkpoints(tmp_path)] == ["step_0000002", "step_0000003"]


def test_loading_restores_weights_moments_and_average(tmp_path: Path) -> None:
    state, other = small(), small()
    save_checkpoint(tmp_path, 7, {"a": 1}, {"net": state}, Accelerator(cpu=True), keep=1)
    with torch.no_grad():
        for parameter in other.module.parameters():
            parameter.add_(1)
    other.optimizer = torch.optim.AdamW(other.module.parameters(), lr=0.1)
    other.ema = build_ema(other.module, 0.9)
    assert load_checkpoint(tmp_path / "step_0000007", {"net": other}) == 7
    assert state.ema is not None
    for mine, theirs in zip(state.module.parameters(), other.module.parameters(), strict=True):
        assert torch.equal(mine, theirs)
        for key in ("exp_avg", "exp_avg_sq", "step"):
            assert torch.equal(state.optimizer.state[mine][key], other.optimizer.state[theirs][key])
    for mine, theirs in zip(state.ema.shadow_params, other.ema.shadow_params, strict=True):
        assert torch.equal(mine, theirs)


def test_the_averaged_weights_are_swapped_in_and_out_again() -> None:
    state = small()
    assert state.ema is not None
    state.module.weight.data += 1  # type: ignore[union-attr, operator]
    before = state.module.weight.detach().clone()  # type: ignore[union-attr, operator]
    with pytest.raises(RuntimeError, match="on purpose"), averaged(state.module, state.ema):
        assert not torch.equal(state.module.weight, before)  # type: ignore[arg-type]
        raise RuntimeError("on purpose")
    assert torch.equal(state.module.weight, before)  # type: ignore[arg-type]


def test_numbers_that_are_not_finite_are_not_written(tmp_path: Path) -> None:
    """The last gate: a weight that overflowed in a step of its own."""
    state = small()
    folder, accelerator = tmp_path / "checkpoints", Accelerator(cpu=True)
    assert save_checkpoint(folder, 1, {}, {"net": state}, accelerator, keep=1)
    with torch.no_grad():
        state.module.weight[1, 2] = float("inf")  # type: ignore[union-attr, operator]
    with pytest.raises(RunError, match=r"step 2 is not saved, since it is not finite: net, weight"):
        save_checkpoint(folder, 2, {}, {"net": state}, accelerator, keep=1)
    assert [path.name for path in folder.iterdir()] == ["step_0000001"]


def test_the_gradient_scaler_comes_back(tmp_path: Path) -> None:
    """fp16's scaler, which torch has for the CPU as well."""
    state = small()
    net, optimizer = state.module, state.optimizer
    assert optimizer is not None
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=2)
    accelerator: Any = SimpleNamespace(
        scaler=scaler, mixed_precision="fp16", num_processes=1, is_main_process=True, device=torch.device("cpu")
    )
    for value in (1.0, 1.0, float("inf"), 1.0):  # grows, backs off, and is half way to growing again
        optimizer.zero_grad()
        scaler.scale(net(torch.ones(1, 3)).sum() * value).backward()
        scaler.step(optimizer)
        scaler.update()
    optimizer.zero_grad()
    assert save_checkpoint(tmp_path, 4, {}, {"net": state}, accelerator, keep=1)
    fresh = torch.amp.GradScaler("cpu")
    accelerator.scaler = fresh
    load_checkpoint(tmp_path / "step_0000004", {"net": small()}, accelerator)
    assert fresh.state_dict() == scaler.state_dict()
    assert (fresh.get_scale(), fresh.state_dict()["_growth_tracker"]) == (64.0, 1)


def test_an_optimizer_that_has_taken_no_step_is_saved_and_loaded_as_such(tmp_path: Path) -> None:
    """Such as a discriminator's before adversarial_start: torch's own state dict counts a step of zeros for it."""
    nets = [torch.nn.Linear(3, 2) for _ in range(2)]
    fresh, other = (TrainState(net, torch.optim.AdamW(net.parameters(), lr=0.1)) for net in nets)
    save_checkpoint(tmp_path, 7, {}, {"net": fresh}, Accelerator(cpu=True), keep=1)
    load_checkpoint(tmp_path / "step_0000007", {"net": other})
    for state in (fresh, other):
        assert state.optimizer is not None and not state.optimizer.state
        state.module(torch.ones(1, 3)).sum().backward()
        state.optimizer.step()
    assert torch.equal(nets[0].weight, nets[1].weight)
    assert fresh.optimizer is not None and int(fresh.optimizer.state[nets[0].weight]["step"]) == 1
