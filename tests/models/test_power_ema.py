"""Power-function averages: against integrals, the sum that they are, and the paper's formulas for rebuilding them."""

from __future__ import annotations

import errno
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import beta

from ldm.models import ema_snapshots
from ldm.models.ema import build_power_averages
from ldm.models.ema_snapshots import FOLDER, drop_snapshots, rebuild, snapshots, write_snapshot
from ldm.models.power_ema import WIDEST, coefficients, exponent, profile, width_of

KEPT = (0.05, 0.1)


@pytest.mark.parametrize("width", [0.01, 0.02, 0.05, 0.1, 0.2, 0.28])
def test_a_width_is_the_standard_deviation_of_its_exponent(width: float) -> None:
    gamma = exponent(width)
    assert beta(gamma + 1, 1).std() == pytest.approx(width, rel=1e-9)  # density (gamma + 1) tau**gamma on [0, 1]
    assert width_of(gamma) == pytest.approx(width, rel=1e-12)
    t = width**-2  # algorithm 2 of the paper
    assert np.roots([1, 7, 16 - t, 12 - t]).real.max() == pytest.approx(gamma, rel=1e-9)


def test_the_widest_counts_every_step_alike() -> None:
    assert exponent(WIDEST) == pytest.approx(0, abs=1e-9)
    assert width_of(0.0) == WIDEST
    for width in (0.0, -0.1, 0.3):
        with pytest.raises(ValueError, match="width"):
            exponent(width)


def test_the_average_is_the_sum_that_its_profile_says() -> None:
    torch.manual_seed(0)
    net = torch.nn.Linear(3, 4).double()
    averages, seen = build_power_averages(net, KEPT), []
    for _ in range(50):
        for weight in net.parameters():
            weight.data += torch.randn_like(weight)
        seen.append(net.weight.detach().clone())
        for average in averages.values():
            average.step(net.parameters())
    for width, average in zip(KEPT, averages.values(), strict=True):
        shares = profile(torch.arange(51, dtype=torch.float64), 50, exponent(width))
        expected = sum(share * weight for share, weight in zip(shares, seen, strict=True))
        assert float(shares.sum()) == pytest.approx(1)
        torch.testing.assert_close(average.shadow_params[0], expected, rtol=1e-9, atol=1e-12)


def dot(t_a: np.ndarray, g_a: np.ndarray, t_b: np.ndarray, g_b: np.ndarray) -> np.ndarray:
    """The integral of two profiles' product (Karras et al. 2024, algorithm 3)."""
    ratio = t_a / t_b
    power = np.where(t_a < t_b, g_b, -g_a)
    return (g_a + 1) * (g_b + 1) * ratio**power / ((g_a + g_b + 1) * np.maximum(t_a, t_b))


@pytest.mark.parametrize("width", [0.03, 0.08, 0.15])
def test_the_combination_is_the_papers(width: float) -> None:
    """Its normal equations in closed form, over a continuum of steps; ours are over the steps that were taken."""
    kept = [(step, exponent(w)) for step in range(250, 2001, 250) for w in KEPT]
    shares, left = coefficients(kept, 2000, exponent(width))
    t, g = (np.array(column, dtype=np.float64) for column in zip(*kept))
    a = dot(t[:, None], g[:, None], t[None], g[None])
    theirs = np.linalg.solve(a, dot(t, g, np.float64(2000), np.float64(exponent(width))))
    assert float(shares.sum()) == pytest.approx(1, abs=1e-9)
    edges = torch.arange(2001, dtype=torch.float64)
    profiles = torch.stack([profile(edges, step, gamma) for step, gamma in kept], 1)
    wanted = profile(edges, 2000, exponent(width))
    ours, paper = (float((profiles @ x - wanted).norm() / wanted.norm()) for x in (shares, torch.from_numpy(theirs)))
    assert ours == pytest.approx(left, rel=1e-6)
    assert ours == pytest.approx(paper, rel=0.05, abs=1e-3)


def test_a_snapshot_that_was_kept_comes_back_as_it_is() -> None:
    kept = [(step, exponent(w)) for step in (10, 20, 30) for w in KEPT]
    shares, left = coefficients(kept, 30, exponent(0.1))
    assert left < 1e-9
    assert shares[-1] == pytest.approx(1) and shares[:-1].abs().max() < 1e-9


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict[str, torch.Tensor]]]:
    """A small network's training with AdamW, whose snapshots are kept, and other widths' averages tracked directly."""
    torch.manual_seed(0)
    run, wanted = tmp_path_factory.mktemp("run"), (0.04, 0.07, 0.15, 0.2)
    net = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.SiLU(), torch.nn.Linear(32, 4))
    teacher = torch.nn.Linear(8, 4)
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
    averages, true = build_power_averages(net, KEPT), build_power_averages(net, wanted)
    names = [name for name, _ in net.named_parameters()]
    for step in range(1, 1001):
        x = torch.randn(16, 8)
        (net(x) - teacher(x).sin() - 0.3 * torch.randn(16, 4)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        for average in [*averages.values(), *true.values()]:
            average.step(net.parameters())
        if step % 25 == 0:
            write_snapshot(run, step, {w: dict(zip(names, a.shadow_params)) for w, a in averages.items()})
    return run, {width: dict(zip(names, a.shadow_params)) for width, a in true.items()}


def test_a_rebuilt_average_is_the_one_that_was_tracked(
    trained: tuple[Path, dict[str, dict[str, torch.Tensor]]],
) -> None:
    run, true = trained
    for width, weights in true.items():
        found = rebuild(run, float(width))
        assert found.step == 1000
        mine, theirs = (torch.cat([w[name].flatten() for name in weights]) for w in (found.weights, weights))
        assert float((mine - theirs).norm() / theirs.norm()) < 1e-3, width
        others = (w for w in true if w != width)  # and widths do differ by more
        for other in others:
            away = torch.cat([true[other][name].flatten() for name in weights])
            assert float((away - theirs).norm() / theirs.norm()) > 3e-3


def test_what_is_missing_or_damaged_is_named(
    trained: tuple[Path, dict[str, dict[str, torch.Tensor]]], tmp_path: Path
) -> None:
    with pytest.raises(FileNotFoundError, match=r"optim\.ema_widths"):
        rebuild(tmp_path, 0.1)
    with pytest.raises(ValueError, match="--ema: a width is above 0"):
        rebuild(trained[0], 0.4)
    write_snapshot(tmp_path, 5, {"0.1": {"a": torch.ones(3)}})
    write_snapshot(tmp_path, 10, {"0.1": {"a": torch.ones(3)}})
    drop_snapshots(tmp_path, 5)
    assert list(snapshots(tmp_path)) == [5]
    file = snapshots(tmp_path)[5] / "0.1.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x01")
    with pytest.raises(ValueError, match=r"step_0000005 is damaged.*delete it"):
        rebuild(tmp_path, 0.1)


def test_a_full_disk_leaves_nothing_half(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "no space")

    write_snapshot(tmp_path, 1, {"0.1": {"a": torch.ones(3)}})
    monkeypatch.setattr(ema_snapshots, "save_file", full)
    with pytest.raises(OSError, match="no space"):
        write_snapshot(tmp_path, 2, {"0.1": {"a": torch.ones(3)}})
    assert [path.name for path in (tmp_path / FOLDER).iterdir()] == ["step_0000001"]
