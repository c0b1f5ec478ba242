"""Steps that are skipped, and losses that jump, against what torch and numpy say."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from ldm.system.errors import RunError
from ldm.training.checkpoint import load_checkpoint, save_checkpoint
from ldm.training.logging import Tracker
from ldm.training.monitor import Watch, batch_of, mean_of_finite, telling, update
from ldm.training.randomness import draw
from ldm.training.train_state import Trainee

NAN, INF = float("nan"), float("inf")


def network() -> tuple[torch.nn.Linear, torch.optim.AdamW]:
    torch.manual_seed(0)
    net = torch.nn.Linear(3, 2)
    return net, torch.optim.AdamW(net.parameters(), lr=0.1, weight_decay=0.5, fused=True)


def take(net: Any, optimizer: Any, value: float, clip: float = 1.0) -> float:
    """A step whose gradients hold this value in one place (0: an ordinary step)."""
    net(torch.ones(1, 3)).square().sum().backward()
    net.weight.grad[0, 0] += value
    return float(update(Accelerator(cpu=True), net, optimizer, 0.1, clip))


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_a_skipped_step_is_as_if_it_had_never_been(value: float) -> None:
    """The same weights and moments, to the last bit, as those of a run that had only the other steps."""
    (one, one_optimizer), (other, other_optimizer) = network(), network()
    assert [take(one, one_optimizer, v) for v in (0, value, 0, value, value, 0)] == [0, 1, 0, 1, 1, 0]
    assert [take(other, other_optimizer, 0) for _ in range(3)] == [0, 0, 0]
    for mine, theirs in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, theirs)
        for key, moment in one_optimizer.state[mine].items():
            assert torch.equal(moment, other_optimizer.state[theirs][key])


@pytest.mark.parametrize("fused", [True, False])
def test_an_ordinary_step_is_torchs_own(fused: bool) -> None:
    (one, _), (other, _) = network(), network()
    ours, theirs = (torch.optim.AdamW(net.parameters(), lr=0.1, fused=fused) for net in (one, other))
    for _ in range(3):
        assert take(one, ours, 0, clip=0.1) == 0
        other(torch.ones(1, 3)).square().sum().backward()
        assert torch.nn.utils.clip_grad_norm_(other.parameters(), 0.1) > 0.1  # so there is something to clip
        theirs.step()
        theirs.zero_grad()
    for mine, other_weight in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.allclose(mine, other_weight, rtol=1e-6, atol=1e-7)
        for key, moment in ours.state[mine].items():
            assert torch.allclose(moment, theirs.state[other_weight][key], rtol=1e-5, atol=0), key
    before = one.weight.clone()
    assert take(one, ours, NAN) == 1
    assert torch.equal(one.weight, before)
    assert all(parameter.grad is None for parameter in one.parameters())


def test_a_loss_that_is_not_finite_tells_its_gradients() -> None:
    for value in (NAN, INF, -INF):
        x = torch.ones(2, requires_grad=True)
        telling(x.sum() + value).backward()
        assert x.grad is not None and x.grad.isnan().all()
    x = torch.tensor([0.1, 0.7], requires_grad=True)
    loss = x.square().sum()
    assert torch.equal(telling(loss), loss)
    (told,) = torch.autograd.grad(telling(loss), x, retain_graph=True)
    assert torch.equal(told, torch.autograd.grad(loss, x)[0])


# --- watching --------------------------------------------------------------------------------------------


def pictures() -> Any:
    return [SimpleNamespace(where=f"data row {i}") for i in range(5)]


def watch(tmp_path: Path, **words: Any) -> Watch:
    tracker = Tracker(tmp_path)
    settings = {"max_skipped": 3, "spike": 8.0, **words}
    return Watch(Accelerator(cpu=True), tracker, batch_of(7, 2, pictures()), lambda step: 0.25, **settings)


def hear(watch: Watch, losses: list[float]) -> None:
    for step, loss in enumerate(losses):
        watch.hear(step, torch.tensor(loss), torch.tensor(float(not math.isfinite(loss))), 0)


def events(tmp_path: Path) -> list[dict[str, Any]]:
    path = tmp_path / "log.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [row for row in rows if "event" in row]


def test_a_batch_is_named_as_it_is_drawn() -> None:
    named = batch_of(7, 2, pictures())(11)
    rows = [draw(7, n, rows=5, latent_shape=(1, 1, 1), caption_dropout=0).row for n in (22, 23)]
    assert named == {"samples": [22, 23], "rows": [f"data row {row}" for row in rows]}


def test_so_many_in_a_row_end_the_run_and_fewer_do_not(tmp_path: Path) -> None:
    seen = watch(tmp_path)
    hear(seen, [1, NAN, NAN, 1, NAN, INF, 1])
    assert seen.skipped == 4
    assert mean_of_finite(seen.take_losses()) == 1
    with pytest.raises(RunError) as ended:
        hear(seen, [NAN, NAN, NAN])
    for word in ("3 steps in a row", "at step 3", "lr 0.25", "samples 4 to 5", *batch_of(7, 2, pictures())(2)["rows"]):
        assert word in str(ended.value)
    assert [event["step"] for event in events(tmp_path)] == [2, 3, 5, 6, 1, 2, 3]


def test_a_jump_is_written_down_and_ordinary_noise_is_not(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    losses = (1 + 0.1 * rng.standard_normal(300)).tolist()
    losses[150] = 1 + 0.1 * 12
    losses[200] = 0.01  # a fall is no spike
    hear(watch(tmp_path), losses)
    (spike,) = events(tmp_path)
    recent = np.array(losses[:150])
    sigma = 1.4826 * np.median(np.abs(recent - np.median(recent)))
    assert (spike["event"], spike["step"], spike["samples"]) == ("spike", 151, [300, 301])
    assert spike["sigmas"] == pytest.approx((losses[150] - np.median(recent)) / sigma, rel=1e-4)
    assert len(spike["rows"]) == 2
    hear(watch(tmp_path / "off", spike=0), losses)
    assert not events(tmp_path / "off")


def test_numbers_that_are_not_finite_are_not_written(tmp_path: Path) -> None:
    """The last gate: a weight that overflowed in a step of its own."""
    net, optimizer = network()
    take(net, optimizer, 0)
    folder, accelerator = tmp_path / "checkpoints", Accelerator(cpu=True)
    assert save_checkpoint(folder, 1, {}, {"net": Trainee(net, optimizer)}, accelerator, keep=1)
    with torch.no_grad():
        net.weight[1, 2] = INF
    with pytest.raises(RunError, match=r"step 2 is not saved, since it is not finite: net, weight"):
        save_checkpoint(folder, 2, {}, {"net": Trainee(net, optimizer)}, accelerator, keep=1)
    assert [path.name for path in folder.iterdir()] == ["step_0000001"]


def test_the_gradient_scaler_comes_back(tmp_path: Path) -> None:
    """fp16's scaler, which torch has for the CPU as well."""
    net, optimizer = network()
    take(net, optimizer, 0)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=2)
    accelerator: Any = SimpleNamespace(
        scaler=scaler, mixed_precision="fp16", num_processes=1, is_main_process=True, device=torch.device("cpu")
    )
    for value in (1.0, 1.0, INF, 1.0):  # grows, backs off, and is half way to growing again
        optimizer.zero_grad()
        scaler.scale(net(torch.ones(1, 3)).sum() * value).backward()
        scaler.step(optimizer)
        scaler.update()
    optimizer.zero_grad()
    assert save_checkpoint(tmp_path, 4, {}, {"net": Trainee(net, optimizer)}, accelerator, keep=1)
    fresh = torch.amp.GradScaler("cpu")
    accelerator.scaler = fresh
    load_checkpoint(tmp_path / "step_0000004", {"net": Trainee(*network())}, accelerator)
    assert fresh.state_dict() == scaler.state_dict()
    assert (fresh.get_scale(), fresh.state_dict()["_growth_tracker"]) == (64.0, 1)
