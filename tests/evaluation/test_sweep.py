"""Which setting a sweep chooses, and that it becomes a pipeline's default."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from diffusers import StableDiffusionPipeline
from scipy.stats import binomtest

from ldm.cli.main import main
from ldm.evaluation.metrics.intervals import proportion_estimate
from ldm.evaluation.report.text import by_guidance, sweep_table
from ldm.evaluation.sweep import choose, mcnemar_p_value, sweep
from ldm.inference.defaults import Defaults
from ldm.pipelines.text_to_image import LDMPipeline


def row(
    steps: int, scale: float, hits: int, kid: float, interval: tuple[float, float] = (0, 1), evaluations: int = 0
) -> dict[str, Any]:
    found = {"top1": proportion_estimate(hits // 2, 100), "top5": proportion_estimate(hits, 100)}
    estimate = {"value": kid, "low": kid - 0.02, "high": kid + 0.02, "standard_error": 0.01, "n": 100}
    cost = {"steps": steps, "guidance_interval": list(interval), "evaluations": evaluations or 2 * steps}
    each = {"heldout": [i < hits for i in range(100)]}
    return {**cost, "guidance_scale": scale, "retrieval": {"heldout": found}, "found": each, "kid": estimate}


# --- the choice ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "chosen"),
    [
        # significantly better retrieval wins, whatever its KID
        ([row(10, 1.0, 20, 0.1), row(50, 3.0, 80, 0.5)], (3.0, 50)),
        # equal retrieval: the smaller KID
        ([row(10, 1.0, 80, 0.5), row(50, 3.0, 82, 0.1)], (3.0, 50)),
        ([row(10, 6.0, 82, 0.5), row(50, 3.0, 80, 0.1)], (3.0, 50)),
        # both equal: the cheaper, then the smaller guidance scale
        ([row(50, 3.0, 82, 0.100), row(10, 4.0, 80, 0.105), row(10, 2.0, 80, 0.107)], (2.0, 10)),
        # cheaper means fewer network evaluations, not fewer steps
        ([row(10, 3.0, 80, 0.1), row(12, 3.0, 80, 0.1, (0.2, 0.6), 17)], (3.0, 12)),
        # a KID two errors away is not equal
        ([row(50, 3.0, 82, 0.100), row(10, 4.0, 80, 0.120)], (3.0, 50)),
    ],
)
def test_the_three_rules(rows: list[dict[str, Any]], chosen: tuple[float, int]) -> None:
    for order in (rows, rows[::-1]):
        best = choose(order, ["heldout"])
        assert (best["guidance_scale"], best["num_inference_steps"]) == chosen


def test_training_captions_decide_where_held_out_ones_cannot() -> None:
    """If a model fails on half of the held-out captions, every setting gets the same other half right."""
    cheap, better, worse = row(8, 2.0, 56, 0.1), row(12, 3.0, 56, 0.1), row(20, 4.0, 20, 0.1)
    for each, hits in ((cheap, 70), (better, 92), (worse, 95)):
        each["found"]["train"] = [i < hits for i in range(100)]
    assert choose([cheap, better, worse], ["heldout"])["num_inference_steps"] == 8
    assert choose([cheap, better, worse], ["heldout", "train"])["num_inference_steps"] == 12
    assert choose([cheap, better, worse], ["train"])["num_inference_steps"] == 12


@pytest.mark.parametrize(("lost", "won"), [(0, 0), (1, 0), (5, 0), (7, 1), (3, 3), (0, 4), (40, 25)])
def test_the_p_value_is_that_of_scipy(lost: int, won: int) -> None:
    found = [False] * lost + [True] * won + [True, False] * 10
    best = [True] * lost + [False] * won + [True, False] * 10
    expected = binomtest(lost, lost + won, alternative="greater").pvalue if lost + won else 1.0
    assert mcnemar_p_value(found, best) == pytest.approx(expected)


def test_every_setting_is_measured_once_and_in_the_table() -> None:
    tried = []

    def measure(settings: Any) -> dict[str, Any]:
        tried.append(settings)
        return {key: row(1, 1, 50, 0.1)[key] for key in ("retrieval", "found", "kid", "evaluations")}

    rows = sweep(measure, (1.0, 3.0), (5, 10), ((0.0, 1.0), (0.2, 0.8)), seed=4)
    wide, narrow = (0.0, 1.0), (0.2, 0.8)
    once = [(1, wide), (3, wide), (3, narrow)]  # unguided pictures have no interval
    assert [(s.steps, s.guidance_scale, s.guidance_interval, s.seed) for s in tried] == [
        (steps, *rest, 4) for steps in (5, 10) for rest in once
    ]
    assert [(r["steps"], r["guidance_scale"], tuple(r["guidance_interval"])) for r in rows] == [
        (s.steps, s.guidance_scale, s.guidance_interval) for s in tried
    ]
    text = sweep_table(rows, ["heldout"]).splitlines()
    assert len(text) == 7 and all("50.0%" in line for line in text[1:]) and "0.2 to 0.8" in text[3]
    each = {name: [r["guidance_scale"] for r in line] for name, line in by_guidance(rows).items()}
    assert each == {
        f"{steps} steps{where}": [1, 3] for steps in (5, 10) for where in ("", ", guidance for t/T in [0.2, 0.8)")
    }


# --- the pipeline's defaults ---------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    pipeline = tiny.pipeline(tmp_path / "text")
    pipeline.defaults = Defaults(num_inference_steps=3, guidance_scale=4.5)
    pipeline.save_pretrained(tmp_path / "pipeline")
    return tmp_path / "pipeline"


def test_a_pipeline_generates_with_its_own_defaults(folder: Path) -> None:
    pipe = LDMPipeline.from_pretrained(folder)
    assert pipe.defaults == Defaults(3, 4.5)
    own = np.asarray(pipe("red heart", seed=1).images[0])
    same = np.asarray(pipe("red heart", seed=1, num_inference_steps=3, guidance_scale=4.5).images[0])
    other = np.asarray(pipe("red heart", seed=1, guidance_scale=1.0).images[0])
    assert (own == same).all()
    assert (own != other).any()
    stock = StableDiffusionPipeline.from_pretrained(folder)  # which ignores the file
    theirs = stock("red heart", num_inference_steps=3, guidance_scale=4.5, output_type="np")
    ours = pipe("red heart", num_inference_steps=3, guidance_scale=4.5, output_type="np")
    assert theirs.images.shape == ours.images.shape


def test_the_command_generates_with_them(folder: Path, tmp_path: Path) -> None:
    words = ["sample", str(folder), "cat", "--seed", "2"]
    main([*words, "--out", str(tmp_path / "own.png")])
    main([*words, "--steps", "3", "--guidance-scale", "4.5", "--out", str(tmp_path / "same.png")])
    main([*words, "--steps", "4", "--out", str(tmp_path / "other.png")])
    files = {name: (tmp_path / f"{name}.png").read_bytes() for name in ("own", "same", "other")}
    assert files["own"] == files["same"] != files["other"]


def test_missing_settings_have_the_general_defaults(folder: Path, tiny_pipeline_folder: Path) -> None:
    assert LDMPipeline.from_pretrained(tiny_pipeline_folder).defaults == Defaults(20, 3.0)
    assert not (tiny_pipeline_folder / "defaults.json").exists()
    (folder / "defaults.json").write_text('{"guidance_scale": 2}')
    assert LDMPipeline.from_pretrained(folder).defaults == Defaults(20, 2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "expected JSON"),
        ("[1]", "expected an object with num_inference_steps, guidance_scale, guidance_interval"),
        (json.dumps({"steps": 3}), "expected an object with num_inference_steps, guidance_scale, guidance_interval"),
        (json.dumps({"num_inference_steps": 2.5}), "num_inference_steps: expected a whole number"),
        (json.dumps({"guidance_scale": True}), "guidance_scale: expected a number"),
        ('{"guidance_scale": NaN}', "guidance_scale: expected a number"),
    ],
)
def test_a_malformed_file_is_refused(folder: Path, text: str, message: str) -> None:
    (folder / "defaults.json").write_text(text)
    with pytest.raises(ValueError, match=f"defaults.json: .*{message}|defaults.json: {message}"):
        LDMPipeline.from_pretrained(folder)
