"""Optimizers by name: each step against a second implementation, each resume to the last bit, each refusal by name."""

from __future__ import annotations

import errno
import importlib.util
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import road
import tiny
import torch
from accelerate import Accelerator, DistributedType
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file
from schedulefree import AdamWScheduleFree
from torch import nn

from ldm.cli.main import main
from ldm.models import ema_snapshots
from ldm.models.ema import build_power_averages
from ldm.models.ema_snapshots import rebuild, snapshots
from ldm.system.errors import RunError
from ldm.training.config import Config, OptimConfig
from ldm.training.ema_snapshots import drop_later_snapshots, keep_snapshot
from ldm.training.objective import DiffusionConfig
from ldm.training.optimizer import update
from ldm.training.optimizers import MOMENTUM, build_optimizer, by_shape, check_optimizer, own_average
from ldm.training.run import train
from ldm.training.train_state import TrainState, load_optimizer_tensors, optimizer_tensors


class Net(nn.Module):
    """Layers of each kind, named as a U-Net's."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv_in, self.conv = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 12, 3, padding=1)
        self.norm, self.linear = nn.GroupNorm(2, 12), nn.Linear(12, 5)
        self.labels, self.conv_out = nn.Embedding(4, 12), nn.Conv2d(5, 3, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm(self.conv(self.conv_in(x)).tanh()) + self.labels.weight.mean(0)[None, :, None, None]
        return self.conv_out(self.linear(h.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))


def gradients(net: nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for weight in net.parameters():
        values = torch.randn(weight.shape, generator=generator) * (1 + step)
        weight.grad = torch.empty_like(weight).copy_(values)  # laid out as the weight, as autograd's are


def built(name: str, net: nn.Module, lr: float = 0.01, weight_decay: float = 0.1) -> Any:
    return build_optimizer(net, name, lr, (0.9, 0.99), weight_decay, Accelerator(cpu=True))


# --- Muon -----------------------------------------------------------------------------------------


def newton_schulz(g: np.ndarray) -> np.ndarray:
    """The quintic iteration of Jordan et al. 2024, in float64."""
    x = g / np.linalg.norm(g)
    x = x.T if g.shape[0] > g.shape[1] else x
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.T if g.shape[0] > g.shape[1] else x


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_step_of_muon_is_that_of_the_paper_and_of_adamw(layout: torch.memory_format) -> None:
    net, other = Net().to(memory_format=layout), Net()
    muon, lr, decay = built("muon", net), 0.01, 0.1
    matrices, rest = by_shape(net)
    assert [tuple(w.shape) for w in matrices] == [(12, 8, 3, 3), (5, 12)]
    names = {id(weight): name for name, weight in net.named_parameters()}
    adamw = torch.optim.AdamW([dict(other.named_parameters())[names[id(w)]] for w in rest], lr=lr, betas=(0.9, 0.99),
                              weight_decay=decay, fused=True)  # fmt: skip
    exact = {id(w): w.detach().double().flatten(1).numpy().copy() for w in matrices}
    momentum = {key: np.zeros_like(weight) for key, weight in exact.items()}
    before = {key: weight.copy() for key, weight in exact.items()}
    for step in range(4):
        gradients(net, step)
        gradients(other, step)
        for weight in matrices:
            g, key = weight.grad.double().flatten(1).numpy(), id(weight)
            momentum[key] = MOMENTUM * momentum[key] + (1 - MOMENTUM) * g
            turned = newton_schulz((1 - MOMENTUM) * g + MOMENTUM * momentum[key])  # Nesterov's
            exact[key] = (1 - lr * decay) * exact[key] - lr * 0.2 * np.sqrt(max(g.shape)) * turned
        muon.step()
        adamw.step()
    for weight in matrices:
        moved = weight.detach().double().flatten(1).numpy() - before[id(weight)]
        expected = exact[id(weight)] - before[id(weight)]
        assert np.linalg.norm(moved - expected) < 0.02 * np.linalg.norm(expected)  # torch iterates in bf16
    for weight in rest:
        assert torch.equal(weight, dict(other.named_parameters())[names[id(weight)]])


# --- schedule-free --------------------------------------------------------------------------------


def test_schedule_free_is_its_closed_form() -> None:
    """y = (1 - beta) z + beta x, and x the mean of all z, weighted by the square of the largest rate so far."""
    net, rates = nn.Linear(4, 3), [0.002, 0.004, 0.006, 0.006, 0.006]
    optimizer = built("schedule_free", net, weight_decay=0.0)
    z, v = net.weight.detach().double().clone(), torch.zeros(3, 4, dtype=torch.float64)
    points = []
    for step, lr in enumerate(rates):
        gradients(net, step)
        g = net.weight.grad.double()
        v = 0.99 * v + 0.01 * g**2
        z = z - lr * g / ((v / (1 - 0.99 ** (step + 1))).sqrt() + 1e-8)
        points.append(z)
        assert update(Accelerator(cpu=True), net, optimizer, lr, 1e9) == 0
    weights = np.square(rates)
    x = sum(w * point for w, point in zip(weights, points, strict=True)) / weights.sum()
    torch.testing.assert_close(net.weight.double(), 0.1 * z + 0.9 * x, rtol=1e-4, atol=1e-6)
    with own_average(net, optimizer):
        torch.testing.assert_close(net.weight.double(), x, rtol=1e-4, atol=1e-6)


def test_its_average_is_lent_without_a_trace() -> None:
    net, optimizer = (lambda net: (net, built("schedule_free", net)))(Net())
    for step in range(3):
        gradients(net, step)
        optimizer.step()
    own = [weight.detach().clone() for weight in net.parameters()]
    with pytest.raises(RuntimeError, match="on purpose"), TrainState(net, optimizer).averaged() as lent:
        inside = [weight.detach().clone() for weight in lent.parameters()]
        raise RuntimeError("on purpose")
    assert all(torch.equal(weight, before) for weight, before in zip(net.parameters(), own, strict=True))
    gradients(net, 3)
    optimizer.step()  # it is in its training mode again
    for weight, before in zip(net.parameters(), own, strict=True):
        weight.data = before
    optimizer.eval()
    assert not all(torch.equal(a, b) for a, b in zip(inside, own, strict=True))


@pytest.mark.parametrize("key", ["decay=cosine", "cooldown=10", "ema_widths=(0.1,)"])
def test_schedule_free_has_no_decay_and_no_other_average(key: str) -> None:
    name, value = key.split("=")
    values = {"cosine": "cosine", "10": 10, "(0.1,)": (0.1,)}
    with pytest.raises(ValueError, match=rf"optim\.{name}: schedule_free"):
        OptimConfig(name="schedule_free", **{name: values[value]})


# --- state as tensors -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["adamw", "muon", "schedule_free"])
def test_a_loaded_state_continues_to_the_last_bit(name: str) -> None:
    """Saved and loaded as tensors, into another network's optimizer, after a skipped step."""
    (net, one), (copy, other) = ((net, built(name, net)) for net in (Net(), Net()))
    for step in range(3):
        gradients(net, step)
        if step == 1:
            net.conv.weight.grad[0, 0] = torch.nan
        assert update(Accelerator(cpu=True), net, one, 0.01 * (step + 1), 1.0) == (step == 1)
    state = {key: tensor.clone() for key, tensor in optimizer_tensors(net, one).items()}
    assert all(isinstance(tensor, torch.Tensor) for tensor in state.values())
    copy.load_state_dict(net.state_dict())
    load_optimizer_tensors(copy, other, state)
    for step in range(3, 6):
        for each, optimizer in ((net, one), (copy, other)):
            gradients(each, step)
            update(Accelerator(cpu=True), each, optimizer, 0.02, 1.0)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), copy.parameters(), strict=True))
    again = optimizer_tensors(copy, other)
    assert again.keys() == state.keys()
    assert all(torch.equal(again[key], tensor) for key, tensor in optimizer_tensors(net, one).items())


# --- refusals -------------------------------------------------------------------------------------


def test_what_can_not_work_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    here = Accelerator(cpu=True)
    with pytest.raises(ValueError, match=r"optim\.name: adamw8bit needs CUDA, and this is cpu"):
        check_optimizer("adamw8bit", here)
    with pytest.raises(ValueError, match=r"optim\.name: expected one of adamw, muon"):
        check_optimizer("sgd", here)
    sharded: Any = SimpleNamespace(distributed_type=DistributedType.FSDP, device=torch.device("cuda"))
    check_optimizer("adamw", sharded)
    for name in ("muon", "schedule_free", "adamw8bit"):
        with pytest.raises(ValueError, match=rf"optim\.name: {name} needs whole weights, and FSDP"):
            check_optimizer(name, sharded)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    cuda: Any = SimpleNamespace(distributed_type=DistributedType.NO, device=torch.device("cuda"))
    for name, extra in (("schedule_free", "schedule-free"), ("adamw8bit", "8bit")):
        with pytest.raises(ModuleNotFoundError, match=rf"optim\.name: {name} needs .* pip install 'ldm\[{extra}\]'"):
            check_optimizer(name, cuda)


# --- whole runs -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of pictures, a text encoder, and a VAE of random weights."""
    folder = tmp_path_factory.mktemp("optimizers")
    road.draw_folder(folder / "data")
    tiny.save_text_encoder(folder / "text", "bert")
    tiny.pipeline(folder / "pipeline").vae.save_pretrained(folder / "vae")
    return folder


@pytest.fixture(scope="module")
def config_of(home: Path) -> Callable[..., Config]:
    def make(run: Path, name: str, **words: Any) -> Config:
        settings = {"run": str(run), "vae": str(home / "vae"), "loop__sample_every": 0, "loop__log_every": 1}
        settings |= {"optim__name": name, "loop__evaluate_every": 0, "loop__checkpoint_every": 2}
        settings |= {"data__cache": str(home / "cache"), "loop__steps": 4, "loop__batch_size": 4}
        if name == "muon":
            settings |= {"optim__ema_widths": [0.05, 0.1], "optim__ema_snapshot_every": 1}
        else:  # on rectified flow, so that two runs show two things
            settings |= {"diffusion__schedule": "rectified_flow", "diffusion__prediction": "flow"}
            settings |= {"diffusion__timestep_sampling": "logit_normal", "diffusion__flow_shift": 2.0}
        return road.recipe(home, **settings | words)

    return make


@pytest.fixture(scope="module")
def runs(config_of: Callable[..., Config], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """For each optimizer a run that nothing happened to, and that never validated."""
    folder = tmp_path_factory.mktemp("straight")
    for name in ("muon", "schedule_free"):
        train("ldm", config_of(folder / name, name))
    return {name: folder / name for name in ("muon", "schedule_free")}


@pytest.mark.parametrize("name", ["muon", "schedule_free"])
def test_a_run_that_was_killed_is_the_run_that_was_not(
    config_of: Callable[..., Config], runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Killed between two checkpoints, and validated at every step: the same weights, state, averages and snapshots."""
    from ldm.training.trainer import Trainer

    real = Trainer.step

    def dies(self: Trainer, step: int, parts: Any) -> Any:
        if step == 3:
            raise KeyboardInterrupt
        return real(self, step, parts)

    config = config_of(tmp_path, name, loop__evaluate_every=1)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Trainer, "step", dies)
        train("ldm", config)
    assert list(snapshots(tmp_path)) == ([1, 2, 3] if name == "muon" else [])
    if name == "muon":
        (tmp_path / "ema_snapshots/.step_0000009.new").mkdir()  # and while it wrote another
    train("ldm", config)
    straight = sorted(
        path.relative_to(runs[name]) for path in runs[name].rglob("*.safetensors") if "cache" not in path.parts
    )
    assert len(straight) > 5
    for path in straight:
        assert (runs[name] / path).read_bytes() == (tmp_path / path).read_bytes(), path
    assert not list((tmp_path / "ema_snapshots").glob(".*"))


def test_schedule_free_exports_its_own_average(runs: dict[str, Path]) -> None:
    run = runs["schedule_free"]
    checkpoint = max(run.glob("checkpoints/ldm/step_*"))
    y, state = load_file(checkpoint / "unet.safetensors"), load_file(checkpoint / "unet.optimizer.safetensors")
    assert not (checkpoint / "unet.ema.safetensors").exists()
    pipeline = StableDiffusionPipeline.from_pretrained(run / "pipeline")
    assert (pipeline.scheduler.config.prediction_type, pipeline.scheduler.config.flow_shift) == ("flow_prediction", 2.0)
    stock = pipeline.unet.state_dict()
    for name, weight in stock.items():
        x = y[name].lerp(state[f"{name}:z"], 1 - 1 / 0.9)
        torch.testing.assert_close(weight, x, rtol=0, atol=0)
    assert any(not torch.equal(weight, y[name]) for name, weight in stock.items())


def test_widths_are_tried_and_the_best_is_exported(
    home: Path, runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = runs["muon"]
    main(["evaluate", str(run), "--ema", "0.05:0.1", "--ema-count", "3", "--net", str(tmp_path / "none")])
    said = capsys.readouterr().out
    rows = [line for line in said.splitlines() if line[3:4] == "0"]
    assert [row.split()[0] for row in (line.strip(" *") for line in rows)] == ["0.05", "0.0707", "0.1"]
    (best,) = (line.split()[1] for line in rows if line.startswith(" *"))
    assert f"export the best with: ldm export {run} FOLDER --ema {best}" in said
    assert (run / "evaluation/ema.png").exists() and (run / "evaluation/ema.json").exists()
    main(["export", str(run), str(tmp_path / "model"), "--ema", "0.1"])
    stock = StableDiffusionPipeline.from_pretrained(tmp_path / "model").unet.state_dict()
    kept = load_file(run / "checkpoints/ldm/step_0000004/unet.ema-0.1.safetensors")
    for name, weight in stock.items():
        torch.testing.assert_close(weight, kept[name].half().float(), rtol=1e-3, atol=1e-6)
    for name, weight in rebuild(run, 0.1).weights.items():
        torch.testing.assert_close(weight, kept[name], rtol=1e-5, atol=1e-7)


def test_another_optimizer_can_not_resume_a_run(config_of: Callable[..., Config], runs: dict[str, Path]) -> None:
    changed = config_of(runs["muon"], "adamw", resume__allow=["optim.name", "optim.ema_widths"])
    changed = replace(changed, diffusion=DiffusionConfig())
    with pytest.raises(RunError, match=r"optim\.name='muon', not 'adamw'"):
        train("ldm", changed)


def test_a_full_disk_costs_snapshots_not_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    net = Net()
    state = {"unet": TrainState(net, powers=build_power_averages(net, (0.1,)))}
    keep_snapshot(tmp_path, 1, state)
    with monkeypatch.context() as patch:
        patch.setattr(ema_snapshots, "check_room", full)
        keep_snapshot(tmp_path, 2, state)
    assert "the averages of step 2 could not be saved" in capsys.readouterr().err
    assert list(snapshots(tmp_path)) == [1]
    keep_snapshot(tmp_path, 3, state)
    drop_later_snapshots(tmp_path, 1, state)
    assert list(snapshots(tmp_path)) == [1]


def test_the_library_is_the_one_that_was_named() -> None:
    assert isinstance(built("schedule_free", Net()), AdamWScheduleFree)
    assert isinstance(built("adamw", Net()), torch.optim.AdamW)
