"""Checkpoints: whole or absent, the newest ones kept, the same with sharded weights."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import road
import torch
from accelerate import Accelerator

from ldm.models.ema import averaged, build_ema
from ldm.training.checkpoint import checkpoints, load_checkpoint, save_checkpoint
from ldm.training.train_state import Trainee

SHARDED = """
import sys
import torch
import torch.distributed as dist
from pathlib import Path
from accelerate import Accelerator
from torch.distributed.fsdp import fully_shard
from ldm.models.ema import build_ema
from ldm.training.checkpoint import load_checkpoint, save_checkpoint
from ldm.training.monitor import telling, update
from ldm.training.train_state import Trainee

def trainee(shard):
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 4))
    if shard:
        for layer in (net[0], net[2]):
            fully_shard(layer)
        fully_shard(net)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01, fused=True)
    return Trainee(net, optimizer, build_ema(net, 0.5))

def steps(t, first, last):
    losses = []
    for step in range(first, last):
        x = torch.randn(6, 8, generator=torch.Generator().manual_seed(step))
        loss = t.module(x).square().mean()
        losses.append(loss.item())
        if step in (1, 4):
            loss = loss + torch.inf  # of this loss the gradients are finite; the step must be skipped all the same
        telling(loss).backward()
        skipped = update(accelerator, t.module, t.optimizer, 0.01, 0.1)
        assert skipped.item() == (step in (1, 4))
        t.ema.step(t.module.parameters())
    return losses

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    accelerator = Accelerator(cpu=True)
    straight = steps(trainee(False), 0, 6)
    first = trainee(True)
    losses = steps(first, 0, 3)
    save_checkpoint(folder, 3, {}, {"net": first}, accelerator, keep=2)
    second = trainee(True)
    assert load_checkpoint(folder / "step_0000003", {"net": second}) == 3
    losses += steps(second, 3, 6)
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(straight), rtol=1e-5, atol=0)
    save_checkpoint(folder, 6, {}, {"net": second}, accelerator, keep=2)
    # and an unsharded network goes on from the sharded one's checkpoint
    whole = trainee(False)
    load_checkpoint(folder / "step_0000003", {"net": whole})
    torch.testing.assert_close(torch.tensor(steps(whole, 3, 6)), torch.tensor(straight[3:]), rtol=1e-5, atol=0)
    print(f"rank {accelerator.process_index} of {accelerator.num_processes} agrees")
    dist.destroy_process_group()
"""


def small() -> Trainee:
    torch.manual_seed(0)
    net = torch.nn.Linear(3, 2)
    trainee = Trainee(net, torch.optim.AdamW(net.parameters(), lr=0.1), build_ema(net, 0.9))
    for _ in range(2):
        net(torch.ones(1, 3)).sum().backward()
        trainee.optimizer.step()
    assert trainee.ema is not None
    trainee.ema.step(net.parameters())
    return trainee


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
    accelerator, trainee = Accelerator(cpu=True), small()
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, step, {}, {"net": trainee}, accelerator, keep=2)
    (tmp_path / ".step_0000009.77").mkdir()  # what a killed process leaves behind
    assert [path.name for path in checkpoints(tmp_path)] == ["step_0000002", "step_0000003"]


def test_loading_restores_weights_moments_and_average(tmp_path: Path) -> None:
    trainee, other = small(), small()
    save_checkpoint(tmp_path, 7, {"a": 1}, {"net": trainee}, Accelerator(cpu=True), keep=1)
    with torch.no_grad():
        for parameter in other.module.parameters():
            parameter.add_(1)
    other.optimizer = torch.optim.AdamW(other.module.parameters(), lr=0.1)
    other.ema = build_ema(other.module, 0.9)
    assert load_checkpoint(tmp_path / "step_0000007", {"net": other}) == 7
    assert trainee.ema is not None
    for mine, theirs in zip(trainee.module.parameters(), other.module.parameters(), strict=True):
        assert torch.equal(mine, theirs)
        for key in ("exp_avg", "exp_avg_sq", "step"):
            assert torch.equal(trainee.optimizer.state[mine][key], other.optimizer.state[theirs][key])
    for mine, theirs in zip(trainee.ema.shadow_params, other.ema.shadow_params, strict=True):
        assert torch.equal(mine, theirs)


def test_the_average_is_lent_and_taken_back() -> None:
    trainee = small()
    assert trainee.ema is not None
    trainee.module.weight.data += 1  # type: ignore[union-attr, operator]
    before = trainee.module.weight.detach().clone()  # type: ignore[union-attr, operator]
    with pytest.raises(RuntimeError, match="on purpose"), averaged(trainee.module, trainee.ema):
        assert not torch.equal(trainee.module.weight, before)  # type: ignore[arg-type]
        raise RuntimeError("on purpose")
    assert torch.equal(trainee.module.weight, before)  # type: ignore[arg-type]
