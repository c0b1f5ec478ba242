"""Two models on the same captions and noise: the paired test against scipy, and what a known difference does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import road
import tiny
import torch
from PIL import Image
from scipy import stats

from ldm.cli.main import main
from ldm.evaluation.metrics.distribution import kid_difference, kid_estimate
from ldm.evaluation.metrics.intervals import paired_estimate


def flip_test(a: torch.Tensor, b: torch.Tensor) -> float:
    """scipy's permutation test of pairs: samples are exchanged within each pair."""
    found = stats.permutation_test(
        (a.numpy(), b.numpy()),
        lambda x, y, axis: np.mean(y - x, axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=20_000,
        rng=1,
    )
    return float(found.pvalue)


@pytest.mark.parametrize("n", [3, 8, 12, 40])
def test_the_p_value_is_scipys(n: int) -> None:
    rng = torch.Generator().manual_seed(n)
    a = torch.randn(n, generator=rng, dtype=torch.float64)
    b = a + 0.4 + torch.randn(n, generator=rng, dtype=torch.float64)
    found = paired_estimate(a, b)
    assert found["p"] == pytest.approx(flip_test(a, b), abs=1e-9 if n <= 12 else 0.01)
    assert found["value"] == pytest.approx(float((b - a).mean()))
    assert (found["a_larger"], found["b_larger"]) == (int((a > b).sum()), int((b > a).sum()))


def test_without_a_difference_p_is_uniform_and_pairing_helps() -> None:
    rng = torch.Generator().manual_seed(0)
    below = 0
    for _ in range(200):
        common = 10 * torch.randn(20, generator=rng, dtype=torch.float64)
        a, b = (common + torch.randn(20, generator=rng, dtype=torch.float64) for _ in range(2))
        below += paired_estimate(a, b, resamples=10)["p"] < 0.2
    assert 24 <= below <= 58  # 200 x 0.2, three standard deviations
    assert paired_estimate(common, common + 0.1 + 0.01 * a)["p"] < 0.01  # a hundredth of the spread of either
    assert paired_estimate(a, a)["p"] == 1


def test_the_difference_in_kid_is_narrower_than_two_intervals() -> None:
    rng = torch.Generator().manual_seed(0)
    real, a = torch.randn(60, 8, generator=rng), torch.randn(40, 8, generator=rng) + 0.3
    b = a + 0.05 * torch.randn(40, 8, generator=rng)
    found = kid_difference(a, b, real, 500)
    first, second = kid_estimate(a, real, 500), kid_estimate(b, real, 500)
    assert found["value"] == pytest.approx(second["value"] - first["value"])
    assert found["high"] - found["low"] < 0.5 * (first["high"] - first["low"])


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set with kinds of tests, two models that differ, a small CLIP."""
    folder = tmp_path_factory.mktemp("compare")
    tiny.pipeline(folder / "text").save_pretrained(folder / "one")
    torch.manual_seed(5)
    other = tiny.pipeline(folder / "text")
    for weight in other.unet.conv_out.parameters():
        torch.nn.init.normal_(weight, std=0.5)
    other.save_pretrained(folder / "two")
    data = road.draw_folder(folder / "data")
    rows = [json.loads(line) for line in (data / "metadata.jsonl").read_text().splitlines()]
    for i, row in enumerate(rows):
        row |= {"split": "heldout" if i % 3 == 0 else "train", "test": ("", "color", "style")[i % 2 + 1]}
    (data / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    net = ["--net-epochs", "1", "--net-text", str(folder / "text"), "--net", str(folder / "net")]
    main(["evaluate", "--data", str(data), "--fit-net", *net])
    return folder


def command(home: Path, out: Path, *words: str) -> dict[str, Any]:
    given = ["--data", str(home / "data"), "--net", str(home / "net"), "--out", str(out), "--train-pictures", "4"]
    main(["compare", *words, *given])
    found: dict[str, Any] = json.loads((out / "comparison.json").read_text("utf-8"))
    return found


def test_both_models_get_the_same_captions_and_noise(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = command(home, tmp_path, str(home / "one"), str(home / "two"), "--steps", "2")
    text = capsys.readouterr().out
    heldout = found["sets"]["heldout"]
    assert heldout["n"] == 8 and found["sets"]["train"]["n"] == 4
    assert set(heldout["kinds"]) == {"color", "style"}
    assert sum(tests["validation loss"]["n"] for tests in heldout["kinds"].values()) == 8
    for one in heldout["pictures"]:
        a, b = (Image.open(tmp_path / name) for name in one["generated"])
        assert a.tobytes() != b.tobytes()
        assert (tmp_path / one["real"]).exists()
    for metric, test in heldout["tests"].items():
        if "p" in test:
            values = np.array([one["values"][metric] for one in heldout["pictures"]])
            assert test["value"] == pytest.approx(float((values[:, 1] - values[:, 0]).mean()))
    loss = heldout["tests"]["validation loss"]
    assert loss["value"] > 0 and loss["p"] < 0.05  # random outputs are worse than those near zero, for every picture
    assert any(line.split()[:2] == ["validation", "loss"] and line.endswith(" A") for line in text.splitlines())
    page = (tmp_path / "comparison.html").read_text("utf-8")
    assert "<script" not in page and page.count("data:image/webp") >= 3
    assert "KID, in-domain CLIP" in page


def test_two_settings_of_one_model(home: Path, tmp_path: Path) -> None:
    one = str(home / "one")
    found = command(home, tmp_path, one, one, "--steps", "2", "3", "--guidance-scale", "2", "--pictures", "3")
    a, b = (model["settings"] for model in found["models"])
    assert (a["steps"], b["steps"]) == (2, 3) and a["guidance_scale"] == b["guidance_scale"] == 2
    assert found["sets"]["heldout"]["tests"]["validation loss"]["value"] == 0  # the same network


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--steps", "2"), "the same model with the same settings"),
        (("--steps", "1", "2", "3"), r"--steps: expected one value for both models or one each, got 3"),
    ],
)
def test_bad_comparisons_are_refused(home: Path, tmp_path: Path, words: tuple[str, ...], message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        command(home, tmp_path, str(home / "one"), str(home / "one"), *words)


def test_models_of_two_sizes_are_refused(home: Path, tmp_path: Path) -> None:
    larger = tiny.pipeline(home / "text")
    larger.unet.register_to_config(sample_size=2 * larger.unet.config.sample_size)
    larger.save_pretrained(tmp_path / "larger")
    with pytest.raises(SystemExit, match="only models of one size can be compared"):
        command(home, tmp_path / "out", str(home / "one"), str(tmp_path / "larger"), "--steps", "1")
