"""The method of the benchmarks: turns, ratios, intervals, and the recording of unchanged scripts."""

from __future__ import annotations

import json
import math
import runpy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors import safe_open

from benchmarks.harness import ROOT, Comparison, Target, compare, median_interval, report
from benchmarks.interleave import Runner, Snapshot, interleave
from benchmarks.pipelines import ours as our_arm
from benchmarks.settings import SETTINGS, Folders, build
from benchmarks.snapshot_quality import SnapshotEvaluator, as_good
from benchmarks.startup import commands
from benchmarks.time_to_quality import reached
from benchmarks.training_runs import OURS_TRIALS, TrainingRuns
from ldm.data.dataset import read_captioned
from ldm.inference.defaults import Defaults
from ldm.models.unet import UNetConfig

SCRIPT = """
import sys, pathlib, torch
weight = torch.nn.Parameter(torch.ones(2))
optimizer = torch.optim.AdamW([weight])
for _ in range(5):
    weight.square().sum().backward()
    optimizer.step()
pathlib.Path(sys.argv[1]).write_text(f"{__name__} {weight.sum().item()}")
"""


def test_arms_take_turns_with_a_canary_between() -> None:
    calls = []

    def arm(name: str, value: float):
        return lambda: calls.append(name) or {"value": value}

    comparison = Comparison("speed", "1/s")
    compare(comparison, arm("ours", 6.0), arm("peer", 2.0), 4, canary=lambda: calls.append("canary") or 1.0)
    turn = ["canary", "ours", "canary", "peer", "canary", "canary", "peer", "canary", "ours", "canary"]
    assert calls == turn * 2
    assert comparison.ratios == [3.0] * 4


def test_a_ratio_of_seconds_is_the_ratio_of_speeds() -> None:
    comparison = Comparison("start", "s", "peer/ours")
    compare(comparison, lambda: {"value": 2.0}, lambda: {"value": 6.0}, 1, canary=lambda: 1.0)
    assert comparison.ratios == [3.0]


def test_a_steady_drift_favors_neither_arm() -> None:
    """Every measurement is 10 % slower than the last one; the ratio of two equal arms stays 1."""
    speed = 1.0

    def slower() -> dict[str, float]:
        nonlocal speed
        speed *= 0.9
        return {"value": speed}

    comparison = compare(Comparison("equal", "1/s"), slower, slower, 40, canary=lambda: 1.0)
    assert math.exp(sum(map(math.log, comparison.ratios)) / 40) == pytest.approx(1.0)


def test_the_interval_of_a_median_covers_it_in_95_percent() -> None:
    import random

    rng = random.Random(1)
    hits = 0
    for trial in range(200):
        low, high = median_interval([rng.gauss(5.0, 1.0) for _ in range(15)], seed=trial, resamples=400)
        hits += low <= 5.0 <= high
    assert 0.90 <= hits / 200 <= 0.99


def test_the_report_keeps_every_pair_and_counts_disturbed_ones(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    canaries = iter([10.0, 10.0, 10.0, 10.0, 10.0, 4.0])
    comparison = Comparison("speed", "1/s", target=Target(1.5, 3))
    values = iter([3.0, 5.0])
    compare(comparison, lambda: {"value": next(values)}, lambda: {"value": 1.0}, 2, canary=lambda: next(canaries))
    found = json.loads(report("speed", [comparison], tmp_path, 1, fact="kept").read_text("utf-8"))
    assert found["fact"] == "kept"
    assert found["comparisons"][0]["ratio"] == 4.0
    assert found["comparisons"][0]["disturbed"] == 1
    assert [pair["ours"]["value"] for pair in found["comparisons"][0]["raw"]] == [3.0, 5.0]
    assert {"torch", "diffusers"} <= set(found["versions"])
    assert "| speed" in capsys.readouterr().out


@pytest.mark.parametrize(("stop_after", "steps"), [(3, 3), (0, 5)])
def test_recording_does_not_change_a_script(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop_after: int, steps: int
) -> None:
    script, out, end = tmp_path / "script.py", tmp_path / "out.json", tmp_path / "end.txt"
    script.write_text(SCRIPT, "utf-8")
    words = [sys.executable, "-m", "benchmarks.record_steps", out, str(stop_after), script, end]
    subprocess.run([str(word) for word in words], cwd=ROOT, check=True)
    found = json.loads(out.read_text("utf-8"))
    assert len(found["steps"]) == steps
    assert sorted(found["steps"]) == found["steps"]
    assert found["started"] < found["steps"][0]
    assert len(found["cpu"]) == steps and sorted(found["cpu"]) == found["cpu"]
    assert found["peak_bytes"] >= found["steps_peak_bytes"] > 2**20
    assert end.exists() == (stop_after == 0)
    if end.exists():  # it computes the same without recording
        recorded, alone = end.read_text("utf-8"), tmp_path / "alone.txt"
        monkeypatch.setattr(sys, "argv", [str(script), str(alone)])
        runpy.run_path(str(script), run_name="__main__")
        assert alone.read_text("utf-8") == recorded


def test_the_recorded_steps_of_ours_are_those_of_the_run_and_not_of_its_check(tmp_path: Path) -> None:
    """Before its first step a run times some steps and overfits a batch, with optimizers of their own."""
    folders = tiny_folders(tmp_path)
    runs = TrainingRuns(
        folders, tmp_path / "work", Path("unused"), batch_size=2, threads=1, warmup=1, steps=2, whole=True
    )
    run = runs.ours()
    assert len(run["steps"]) == 2  # between the ends of three
    logged = [json.loads(line) for line in (tmp_path / "work/ours/log.jsonl").read_text("utf-8").splitlines()]
    assert logged[-1]["step"] == 3
    record = json.loads((tmp_path / "work/train_ldm.json").read_text("utf-8"))
    assert record["optimizers"] == OURS_TRIALS + 1  # one more or less would be another's steps
    stopped = replace(runs, whole=False).ours()
    assert len(stopped["steps"]) == 2
    assert not (tmp_path / "work/ours/pipeline").exists()


def tiny_folders(folder: Path) -> Folders:
    """The inputs of both trainings, with six pictures and small networks."""
    from PIL import Image

    rows = [{"file_name": f"{i}.png", "text": f"drawing {i}"} for i in range(6)]
    (folder / "source").mkdir()
    for row in rows:
        Image.new("RGB", (64, 64), (255, 0, 0)).save(folder / "source" / row["file_name"])
    (folder / "source/metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    small = UNetConfig(channels=(64, 64), attention=(False, True), layers=1)
    setting = replace(SETTINGS["C"], layers=1, width=64, heads=2, unet_config=small)
    return build(setting, str(folder / "source"), folder / "given")


def test_both_trainings_get_the_same_networks_and_only_training_pictures(tmp_path: Path) -> None:
    from diffusers import StableDiffusionPipeline
    from PIL import Image

    from ldm.models.text_encoder import TextConfig, TextEncoder

    source = tmp_path / "source"
    (source / "images").mkdir(parents=True)
    rows = [{"file_name": f"images/{i}.png", "text": f"drawing {i}", "split": "heldout" if i % 3 == 0 else "train"}
            for i in range(9)]  # fmt: skip
    for row in rows:
        Image.new("RGBA", (64, 64), (255, 0, 0, 0)).save(source / row["file_name"])
    (source / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")

    given = build(SETTINGS["C"], str(source), tmp_path / "given", seed=3)
    read = read_captioned(str(given.data), holdout=0, progress=False)
    assert sorted(row.captions[0] for row in read) == sorted(row["text"] for row in rows if row["split"] == "train")
    assert Image.open(given.data / "images/000000.png").getpixel((0, 0)) == (255, 255, 255)  # transparent on white
    stock = StableDiffusionPipeline.from_pretrained(given.model, use_safetensors=True)
    ours = TextEncoder.load(TextConfig(encoder=str(given.text), max_length=SETTINGS["C"].tokens))
    theirs = stock.encode_prompt(["drawing 4"], "cpu", 1, False)[0]
    assert torch.equal(theirs, ours.encode(["drawing 4"]))
    torch.manual_seed(3)
    fresh = SETTINGS["C"].unet((4, 16, 16)).state_dict()
    assert all(torch.equal(weight, fresh[name]) for name, weight in stock.unet.state_dict().items())


AVERAGING = """
import pathlib, sys
import torch
from diffusers.training_utils import EMAModel
from ldm.models.ema import build_ema
folder = pathlib.Path(sys.argv[1])
network = torch.nn.Linear(2, 2)
def average(ema, steps, name):
    for step in range(steps):
        (folder / f"want-{name}").touch() if step == steps - 1 else None
        ema.step(network.parameters())
average(build_ema(network, 0.9), 4, "000")
torch.nn.init.constant_(network.weight, 2.0)
average(EMAModel(network.parameters()), 3, "001")
torch.nn.init.constant_(network.weight, 3.0)
average(build_ema(network, 0.9), 2, "002")
"""


def test_snapshots_of_both_kinds_of_average_and_only_the_last_average_counts(tmp_path: Path) -> None:
    """A process may have several: ours has one for its check before the run."""
    (tmp_path / "averaging.py").write_text(AVERAGING, "utf-8")
    words = [f"--snapshots={tmp_path}", tmp_path / "record.json", "0", tmp_path / "averaging.py", tmp_path]
    subprocess.run([sys.executable, "-m", "benchmarks.record_steps", *map(str, words)], cwd=ROOT, check=True)
    for number, (steps, value) in enumerate([(4, None), (3, 2.0), (2, 3.0)]):
        with safe_open(tmp_path / f"00{number}.safetensors", "pt") as file:
            metadata, weight = file.metadata(), file.get_tensor("0000")
        assert metadata["average"] == str(number) and metadata["step"] == str(steps)
        assert value is None or torch.equal(weight, torch.full((2, 2), value))
    (found,) = Runner([], tmp_path, [1.0], 1, tmp_path / "log", turns=[(0.0, math.inf)]).snapshots()
    assert found.step == 2 and found.file.name == "002.safetensors"


TRAINING = """
import pathlib, sys, time
import numpy
from safetensors.numpy import save_file
folder, beats = pathlib.Path(sys.argv[1]), open(sys.argv[2], "w")
for step in range(1, 100_000):
    time.sleep(0.005)
    print(time.monotonic(), file=beats, flush=True)
    for wanted in folder.glob("want-*"):
        name = wanted.name.removeprefix("want-")
        facts = {"time": str(time.monotonic()), "step": str(step), "average": "0"}
        save_file({"weight": numpy.zeros(1)}, folder / f".{name}", facts)
        (folder / f".{name}").rename(folder / f"{name}.safetensors")
        wanted.unlink()
"""


def test_trainings_run_in_turns_and_only_their_own_time_counts(tmp_path: Path) -> None:
    (tmp_path / "training.py").write_text(TRAINING, "utf-8")

    def runner(name: str, marks: list[float]) -> Runner:
        folder = tmp_path / name
        command = [sys.executable, tmp_path / "training.py", folder, tmp_path / f"{name}.beats"]
        return Runner(command, folder, marks, threads=1, log=tmp_path / f"{name}.log")

    a, b = runner("a", [0.5, 0.9, 1.5]), runner("b", [1.2])
    interleave([a, b], seconds=0.4)
    assert len(a.turns) >= 3
    for mine, theirs in ((a, b), (b, a)):
        assert mine.process is not None and mine.process.poll() is not None
        beats = [float(line) for line in (tmp_path / f"{mine.folder.name}.beats").read_text("utf-8").splitlines()]
        stopped = 0.05  # a signal needs some time to arrive
        assert not [t for t in beats for begin, end in theirs.turns if begin + stopped < t < end - stopped]
        found = mine.snapshots()
        assert found[-1].seconds >= mine.marks[-1]
        assert [snapshot.seconds for snapshot in found] == sorted(snapshot.seconds for snapshot in found)
        assert all(snapshot.seconds >= mark for snapshot, mark in zip(found[::-1], mine.marks[::-1]))
        total = sum(end - begin for begin, end in mine.turns)
        assert mine.own_time(math.inf) == pytest.approx(total) and mine.own_time(mine.turns[0][0]) == 0.0


def test_a_training_that_ends_too_early_is_an_error_with_its_output(tmp_path: Path) -> None:
    runner = Runner([sys.executable, "-c", "print('no such flag')"], tmp_path / "a", [60.0], 1, tmp_path / "log")
    with pytest.raises(SystemExit, match="no such flag"):
        interleave([runner], seconds=60.0)


def test_as_good_means_in_rank_and_kid() -> None:
    goal = {"rank": 200.0, "kid": 1.0}
    assert as_good({"rank": 200.0, "kid": 1.0}, goal)
    assert not as_good({"rank": 100.0, "kid": 1.1}, goal)
    assert not as_good({"rank": 300.0, "kid": 0.5}, goal)


FROZEN = Path("run/frozen")


class Ranks:
    """An evaluator with a given rank for every snapshot."""

    def __init__(self, *ranks: float) -> None:
        self.ranks, self.calls = ranks, 0
        self.snapshots = [Snapshot(Path(str(place)), 10.0 * (place + 1), place) for place in range(len(ranks))]

    def evaluate(self, weights: Path, frozen: Path) -> dict[str, Any]:
        assert frozen == FROZEN
        self.calls += 1
        return {"rank": self.ranks[int(weights.name)], "kid": 0.0}


@pytest.mark.parametrize(
    ("ranks", "since", "calls"),
    [
        ([400, 250, 190, 150], 30.0, 3),
        ([400, 150, 250, 190, 150], 40.0, 3),  # a good snapshot before a worse one doesn't count
        ([190, 180], 10.0, 2),
        ([190, 210], None, 1),
    ],
)
def test_quality_is_reached_when_all_later_snapshots_keep_it(
    ranks: list[float], since: float | None, calls: int
) -> None:
    evaluator = Ranks(*ranks)
    goal = {"rank": 200.0, "kid": 0.0}
    found, results = reached(cast(SnapshotEvaluator, evaluator), evaluator.snapshots, FROZEN, goal)
    assert found == since and evaluator.calls == calls
    assert [result["rank"] for result in results] == ranks[-calls:]  # in the order of training


def test_large_pictures_are_measured_where_there_is_an_upscaler(tmp_path: Path) -> None:
    Defaults(8, 3.0).save(tmp_path)
    without = commands(tmp_path, tmp_path)
    (tmp_path / "upscaler").mkdir()
    [(name, (ours, stock, _))] = [one for one in commands(tmp_path, tmp_path).items() if one[0] not in without]
    assert name == "first upscaled picture, stock at its defaults"
    assert ours[-1] == "--upscale" and stock[-3:] == ["50", "3.0", str(tmp_path / "upscaler")]


def test_the_rows_of_a_student_are_counted() -> None:
    arm = our_arm(ROOT / "models/emoji", torch.device("cpu"))
    assert arm.rate(1)["unet_rows_per_picture"] == arm.pipeline.student.defaults.num_inference_steps == 4
    arm.rows = 0
    arm.generate(["pizza"], num_inference_steps=2, guidance_scale=3.0)
    assert arm.rows == 4  # the model itself, guided
