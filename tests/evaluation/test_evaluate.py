"""`ldm evaluate`, from the command line to the files that it writes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import road
import tiny
import torch
from PIL import Image

from ldm.cli.main import main
from ldm.data.dataset import CaptionedPictures, read_captioned
from ldm.evaluation.evaluate import QUICK, evaluate
from ldm.evaluation.evaluated_model import EvaluatedModel, SamplingSettings, consecutive
from ldm.evaluation.features import FeatureExtractor, pixel_extractor
from ldm.models.fingerprint import model_sha256
from ldm.models.lora import LoRAConfig
from ldm.pipelines.text_to_image import LDMPipeline


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline and a folder of pictures, two of them new compositions."""
    folder = tmp_path_factory.mktemp("evaluate")
    tiny.pipeline(folder / "text").save_pretrained(folder / "model")
    road.draw_folder(folder / "data")
    lines = (folder / "data/metadata.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    for i, row in enumerate(rows):
        row["split"] = "heldout" if i % 4 == 0 else "train"
        row["composition"] = i in (0, 4)
        row["concept"] = i // 4  # a number for each shape, of which there are several colors
    (folder / "data/metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def command(home: Path, out: Path, *words: str) -> dict[str, Any]:
    given = [str(home / "model"), "--data", str(home / "data"), "--out", str(out), "--net", str(home / "net")]
    main(["evaluate", *given, "--quick", "--steps", "2", *words])
    report: dict[str, Any] = json.loads((out / "evaluation.json").read_text("utf-8"))
    return report


# --- the whole command ------------------------------------------------------------------------------


def test_evaluation_json_is_complete_and_its_files_exist(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "model"
    shutil.copytree(home / "model", model)
    net = ["--fit-net", "--net-epochs", "1", "--net-text", str(home / "text"), "--net", str(tmp_path / "net")]
    grid = ["--sweep", "--sweep-guidance", "1", "2", "--sweep-steps", "1", "--sweep-pictures", "4", "--write-defaults"]
    grid += ["--sweep-intervals", "0:1", "0.2:0.8"]
    out = tmp_path / "out"
    words = ["--data", str(home / "data"), "--out", str(out), "--quick", "--steps", "2"]
    main(["evaluate", str(model), *words, *net, *grid])
    printed = capsys.readouterr().out
    report = json.loads((out / "evaluation.json").read_text("utf-8"))

    card = json.loads((tmp_path / "net/net.json").read_text())
    assert report["spaces"][1]["name"] == "in-domain CLIP" and report["spaces"][1]["sha256"] == card["sha256"]
    assert report["data"] | {"sha256": "", "source": ""} == {
        "source": "", "sha256": "", "pictures": 24, "training": 18, "heldout": 6,
        "kinds": {"compositions": 2, "others": 4},
    }  # fmt: skip
    assert report["text_use"]["n"] == 6 and set(report["text_use"]["gaps"]) == {"shuffled", "null"}
    for name, n in (("train", 16), ("heldout", 6)):
        for features in ("pixels", "in-domain CLIP"):
            assert report["retrieval"][name]["drawn"][features]["top5"]["n"] == n
            assert report["retrieval"][name]["ceiling"][features]["candidates"] == 24
            assert report["memorization"][features][name]["verdict"] in ("copies", "some copies", "no sign of copies")
        assert len(report["pictures"][name]) == n
        for i, picture in enumerate(report["pictures"][name]):
            assert picture["seed"] == i
            assert Image.open(out / picture["drawn"]).size == Image.open(out / picture["real"]).size == (16, 16)
            assert all((out / found["real"]).exists() for found in picture["nearest_training"].values())
    assert report["retrieval"]["train"]["drawn"]["pixels"]["relatives"]["top1"]["n"] == 16
    page = (out / "report.html").read_text("utf-8")
    assert "Concept: top-1 among the pictures of the same concept" in page
    assert "top-1 among pictures of the same concept" in printed
    found = report["retrieval"]["heldout"]["drawn"]["in-domain CLIP"]
    assert found["compositions"]["top1"]["n"] == 2 and found["others"]["top1"]["n"] == 4
    assert set(report["distribution"]) == {"in-domain CLIP"}  # not of pixels
    assert report["distribution"]["in-domain CLIP"]["reference_n"] == 18
    assert report["text_fit"]["heldout"]["in-domain CLIP"]["shuffled"]["n"] == 6

    best = report["sweep"]["best"]
    rows = [(r["guidance_scale"], r["guidance_interval"], r["evaluations"]) for r in report["sweep"]["rows"]]
    # a single step is at t = T - 1, outside of the narrow interval; scale 1 is unguided everywhere
    assert rows == [(1, [0, 1], 1), (2, [0, 1], 2), (2, [0.2, 0.8], 1)] and best["num_inference_steps"] == 1
    assert json.loads((model / "defaults.json").read_text()) == best
    assert LDMPipeline.from_pretrained(model).defaults.guidance_scale == best["guidance_scale"]
    assert "memorization, in-domain CLIP" in printed and "KID x 1000" in printed


def test_a_student_is_evaluated_and_compared_by_the_name_of_its_folder(home: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    model, words = tmp_path / "model", ["--data", str(home / "data"), "--net", str(home / "net")]
    tiny.lora(home / "model", tmp_path / "lora", LoRAConfig(rank=2, alpha=4, targets=("to_q",)), few_steps=2)
    main(["export", str(home / "model"), str(model), "--few-steps", str(tmp_path / "lora")])
    main(["evaluate", str(model / "few_steps"), *words, "--quick", "--out", str(tmp_path / "out")])
    report = json.loads((tmp_path / "out/evaluation.json").read_text("utf-8"))
    assert report["settings"]["steps"] == 2 and report["settings"]["guidance_scale"] == 1
    assert "<h1>model/few_steps</h1>" in (tmp_path / "out/report.html").read_text("utf-8")
    assert report["model"]["sha256"] != model_sha256(LDMPipeline.from_pretrained(model))
    main(["compare", str(model), str(model / "few_steps"), *words, "--out", str(tmp_path / "compared")])
    assert (tmp_path / "compared/comparison.html").exists()


@pytest.mark.parametrize(("scale", "interval"), [(1.0, (0, 1)), (3.0, (0, 1)), (3.0, (0.2, 0.8)), (3.0, (0, 0.301))])
def test_unet_evaluations_are_those_of_generation(home: Path, scale: float, interval: tuple[float, float]) -> None:
    model = EvaluatedModel(LDMPipeline.from_pretrained(home / "model"), home / "model")
    settings, rows = SamplingSettings(7, scale, 0, interval), []
    model.pipeline.unet.conv_in.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    model.generate(["red heart"] * 3, 0, settings)
    assert len(rows) == 7 and sum(rows) == 3 * model.unet_evaluations(settings)


def test_pictures_are_reused_by_the_same_request_only(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    generate = EvaluatedModel.generate

    def counted(self: EvaluatedModel, captions: Any, first: int, settings: SamplingSettings) -> Any:
        calls.append(len(captions))
        return generate(self, captions, first, settings)

    monkeypatch.setattr(EvaluatedModel, "generate", counted)
    first = command(home, tmp_path)
    assert sum(calls) == 22
    paths = [tmp_path / picture["drawn"] for picture in first["pictures"]["heldout"]]
    before = [np.asarray(Image.open(path)).astype(int) for path in paths]

    calls.clear()
    again = command(home, tmp_path)
    assert not calls
    assert again["pictures"] == first["pictures"] and again["retrieval"] == first["retrieval"]

    paths[3].unlink()  # as if it had been interrupted
    command(home, tmp_path)
    assert calls == [1]
    assert np.abs(np.asarray(Image.open(paths[3])).astype(int) - before[3]).max() <= 1  # a batch's rounding

    calls.clear()
    command(home, tmp_path, "--guidance-scale", "1")
    assert sum(calls) == 22


def test_the_reported_seed_reproduces_a_picture(home: Path, tmp_path: Path) -> None:
    report = command(home, tmp_path, "--seed", "5", "--guidance-scale", "3")
    pipe = LDMPipeline.from_pretrained(home / "model")
    for picture in report["pictures"]["heldout"][:3]:
        again = pipe(picture["caption"], num_inference_steps=2, guidance_scale=3.0, seed=picture["seed"]).images[0]
        kept = np.asarray(Image.open(tmp_path / picture["drawn"])).astype(int)
        assert np.abs(np.asarray(again).astype(int) - kept).max() <= 1


# --- known models --------------------------------------------------------------------------------


class LookupModel(EvaluatedModel):
    """ "Generates" a real picture for each caption."""

    def __init__(self, pipeline: Any, folder: Path, pictures: CaptionedPictures, answers: dict[str, str]) -> None:
        super().__init__(pipeline, folder)
        self.rows = {row.captions[0]: row for row in pictures}
        self.answers = answers

    def generate(self, captions: Any, first: int, settings: SamplingSettings) -> list[Image.Image]:
        return [self.rows[self.answers.get(caption, caption)].image() for caption in captions]


def evaluate_lookup(home: Path, out: Path, answers: dict[str, str]) -> dict[str, Any]:
    pictures = read_captioned(home / "data", progress=False)
    model = LookupModel(LDMPipeline.from_pretrained(home / "model"), home / "model", pictures, answers)
    pixels = pixel_extractor(tiny.SIZE)
    net = FeatureExtractor("net", "a hash", "none", "cosine", lambda x: x.flatten(1)[:, ::7])
    return evaluate(model, pictures, [pixels, net], SamplingSettings(1, 1.0), out, QUICK, log=lambda message: None)


def test_a_model_that_returns_the_right_pictures_has_perfect_metrics(home: Path, tmp_path: Path) -> None:
    report = evaluate_lookup(home, tmp_path, {})
    for name in ("train", "heldout"):
        for found in report["retrieval"][name]["drawn"].values():
            assert found["top1"]["value"] == 1
    assert report["distribution"]["net"]["drawn"] == report["distribution"]["net"]["floor"]
    for verdicts in report["memorization"].values():
        assert verdicts["heldout"]["verdict"] == "no sign of copies"
        assert verdicts["heldout"]["median_ratio"] == 1
        assert verdicts["train"]["verdict"] == "copies"  # training pictures for training captions, to the pixel
        assert verdicts["train"]["median_ratio"] == 0


def test_a_model_that_returns_one_training_picture_is_flagged(home: Path, tmp_path: Path) -> None:
    pictures = read_captioned(home / "data", progress=False)
    only = pictures.train[0].captions[0]
    report = evaluate_lookup(home, tmp_path, {row.captions[0]: only for row in pictures})
    for features in ("pixels", "net"):
        assert report["retrieval"]["heldout"]["drawn"][features]["top1"]["value"] == 0
        assert report["memorization"][features]["heldout"]["verdict"] == "copies"
    nearest = report["pictures"]["heldout"][0]["nearest_training"]["pixels"]
    assert nearest["caption"] == only and nearest["distance"] == 0
    generated, baseline = (report["distribution"]["net"][kind] for kind in ("drawn", "floor"))
    assert generated["recall"]["value"] == pytest.approx(1 / 18)  # that picture itself
    assert baseline["recall"]["value"] > 0.3


def test_without_held_out_pictures_training_captions_are_used(home: Path, tmp_path: Path) -> None:
    shutil.copytree(home / "data", tmp_path / "data")
    rows = [json.loads(line) for line in (home / "data/metadata.jsonl").read_text().splitlines()]
    (tmp_path / "data/metadata.jsonl").write_text("".join(json.dumps({**r, "split": "train"}) + "\n" for r in rows))
    shutil.copytree(home / "model", tmp_path / "model")
    report = evaluate_lookup(tmp_path, tmp_path / "out", {})
    assert report["text_use"]["on"] == "train" and report["memorization"] == {}
    assert report["distribution"]["net"]["reference_n"] == 24 - 16  # the pictures of no prompt


# --- inputs and identity -----------------------------------------------------------------------------


def test_a_run_defines_pipeline_data_and_split(home: Path, tmp_path: Path) -> None:
    """The newest checkpoint's config counts: its holdout, not the default."""
    run = tmp_path / "run"
    shutil.copytree(home / "model", run / "pipeline")
    road.draw_folder(tmp_path / "data")  # no split column
    config = {"data": {"source": str(tmp_path / "data"), "size": 16, "holdout": 0.5}}
    for step, holdout in ((1, 0.1), (2, 0.5)):
        config["data"]["holdout"] = holdout
        checkpoint = run / "checkpoints" / f"step_{step:07d}"
        checkpoint.mkdir(parents=True)
        (checkpoint / "state.json").write_text(json.dumps({"step": step, "config": config}))
    expected = len(read_captioned(tmp_path / "data", holdout=0.5, progress=False).heldout)
    for named in (run, run / "pipeline"):
        main(["evaluate", str(named), "--quick", "--steps", "1", "--net", str(home / "net")])
        report = json.loads((run / "evaluation/evaluation.json").read_text("utf-8"))
        assert report["data"]["heldout"] == expected > 4
        shutil.rmtree(run / "evaluation")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "model: name a run or a pipeline folder"),
        (["no/such/run"], "no/such/run is neither a run nor a pipeline folder"),
        (["{home}/model"], "data: no run defines the data set"),
        (
            ["{home}/model", "--data", "{home}/data", "--write-defaults"],
            "--write-defaults: it writes what --sweep finds",
        ),
        (["{home}/model", "--data", "{home}/data", "--features", "inception"], "features: inception needs its weights"),
    ],
)
def test_errors_are_one_line(home: Path, words: list[str], message: str) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["evaluate", *[word.format(home=home) for word in words]])
    assert str(stopped.value).startswith("error: ") and message in str(stopped.value)


def test_the_models_hash_depends_on_networks_and_scheduler_only(home: Path, tmp_path: Path) -> None:
    def known(folder: Path) -> str:
        return model_sha256(LDMPipeline.from_pretrained(folder))

    shutil.copytree(home / "model", tmp_path / "model")
    before = known(tmp_path / "model")
    (tmp_path / "model/defaults.json").write_text('{"guidance_scale": 2}')
    assert known(tmp_path / "model") == before == known(home / "model")
    for file in ("unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"):
        weights = tmp_path / "model" / file
        data = bytearray(weights.read_bytes())
        data[-1] ^= 1
        weights.write_bytes(data)
        assert known(tmp_path / "model") != before
        shutil.copy(home / "model" / file, weights)
    scheduler = tmp_path / "model/scheduler/scheduler_config.json"
    scheduler.write_text(scheduler.read_text().replace('"epsilon"', '"v_prediction"'))
    assert known(tmp_path / "model") != before


def test_runs_of_consecutive_numbers() -> None:
    assert consecutive([0, 1, 2, 5, 6, 9], 2) == [[0, 1], [2], [5, 6], [9]]


def test_latents_are_scaled_posterior_means(home: Path) -> None:
    pipe = LDMPipeline.from_pretrained(home / "model")
    model = EvaluatedModel(pipe, home / "model")
    pixels = torch.rand(2, 3, 16, 16) * 2 - 1
    expected = pipe.vae.encode(pixels).latent_dist.mean * pipe.vae.config.scaling_factor
    torch.testing.assert_close(model.latents(pixels), expected)
    assert torch.allclose(model.schedule.alpha_bar.float(), pipe.scheduler.alphas_cumprod, atol=1e-6)
