"""Sharing: the card is valid for the Hub's parser; the upload equals the dry run, with a stand-in for the Hub."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import road
import tiny
import torch
import yaml
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from huggingface_hub import ModelCard
from stand_in import Hub

from ldm.cli.main import main
from ldm.inference.defaults import Defaults
from ldm.models.fingerprint import model_sha256
from ldm.pipelines.text_to_image import LDMPipeline
from ldm.sharing import hub as ldm_hub
from ldm.sharing import png_metadata
from ldm.sharing.model_card import Terms, headline, limits
from ldm.training.config import to_dict

FEW = Defaults(num_inference_steps=2)
WORDS = ["--license", "cc-by-sa-4.0", "--data", "24 shapes <b>", "--data-license", "cc0-1.0"]
PROMPTS = ("red heart", "cat <b>")
USER = "ada lovelace"  # the test's folders are in this user's home


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """An empty repository, at the address that huggingface_hub takes for the Hub's."""
    with Hub() as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.url)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", "hf_nobody")
        yield server
        server.shutdown()
        assert not server.refused


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An evaluated run in a user's home."""
    folder = tmp_path_factory.mktemp("hub") / f"home/{USER}"
    pipeline = tiny.pipeline(folder / "text")
    pipeline.example_prompts, pipeline.defaults = PROMPTS[:1], FEW
    pipeline.save_pretrained(folder / "run/pipeline")
    road.draw_folder(folder / "data")
    checkpoint = folder / "run/checkpoints/step_0000004"
    checkpoint.mkdir(parents=True)
    config = to_dict(road.recipe(folder, data__holdout=0.3, data__cache=str(folder / "latents")))
    (checkpoint / "state.json").write_text(json.dumps({"step": 4, "config": config}))
    words = ["--quick", "--steps", "1", "--net", str(folder / "a net")]
    words += ["--fit-net", "--net-epochs", "1", "--net-text", str(folder / "text")]
    main(["evaluate", str(folder / "run"), *words])
    return folder / "run"


@pytest.fixture(scope="module")
def shared(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dry run."""
    out = tmp_path_factory.mktemp("dry") / "out"
    main(["push", str(run), "someone/shapes", *WORDS, "--dry-run", str(out)])
    return out


def files(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_the_dry_run_is_what_is_uploaded_byte_for_byte(
    hub: Hub, run: Path, shared: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The upload is online, the dry run offline, which transformers would write into its files."""
    main(["push", str(run), "someone/shapes", *WORDS, "--private"])
    printed = capsys.readouterr().out
    assert "uploaded to " in printed and "someone/shapes" in printed
    assert hub.made["name"] == "shapes" and hub.made["organization"] == "someone"
    assert hub.made.get("visibility") == "private" or hub.made.get("private") is True  # by version
    expected = files(shared)
    assert hub.files.keys() == expected.keys()
    assert [name for name in expected if hub.files[name] != expected[name]] == []
    assert {"README.md", "report.html", "evaluation.json", "gallery.png", "loss_by_t.png"} <= expected.keys()
    assert {"pictures/0.png", "unet/diffusion_pytorch_model.fp16.safetensors"} <= expected.keys()
    ModelCard.load(shared / "README.md").validate()
    assert len(hub.cards) >= 2 and set(hub.cards) == {expected["README.md"].decode()}  # committed, and validate()


def test_no_path_and_no_user_name_is_shared(run: Path, shared: Path) -> None:
    home = run.parent
    before = files(run / "evaluation")
    assert USER.encode() in before["evaluation.json"] and USER.encode() in before["report.html"]
    secrets = [
        str(home),
        str(home.parent),
        str(shared.parent),
        str(Path.home()) + "/",
        str(road.ROOT),
        USER,
        "lovelace",
    ]
    for name, data in files(shared).items():
        text = re.sub(rb"data:image/webp;base64,[^\"]*", b"", data)
        found = [secret for secret in secrets if secret.encode() in text]
        found += [secret for secret in secrets if json.dumps(secret)[1:-1].encode() in text]
        assert not found, name
    card, page = ((shared / name).read_text("utf-8") for name in ("README.md", "report.html"))
    report = json.loads((shared / "evaluation.json").read_text("utf-8"))
    assert report["model"]["folder"] == "run/pipeline" and report["data"]["source"] == "data"
    assert report["pictures"]["train"][0]["where"].startswith("data/metadata.jsonl row ")
    assert "ldm evaluate 'run' --quick" in report["command"] and '"source": "data"' in card and "<h1>run</h1>" in page
    assert files(run / "evaluation") == before  # the local evaluation is unchanged


def test_the_hubs_parser_reads_every_metric(run: Path, shared: Path) -> None:
    card = ModelCard.load(shared / "README.md")
    data = card.data
    assert (data.license, data.library_name, data.pipeline_tag) == ("cc-by-sa-4.0", "diffusers", "text-to-image")
    assert data.to_dict()["training_data_license"] == "cc0-1.0"
    assert data.to_dict()["widget"] == [{"text": "red heart", "output": {"url": "pictures/0.png"}}]
    report = json.loads((run / "evaluation/evaluation.json").read_text())
    found = {(one.metric_name, one.dataset_split): one for one in data.eval_results}
    assert len(found) == len(data.eval_results)
    fid = report["distribution"]["in-domain CLIP"]["drawn"]["fid"]
    one = found["FID, in-domain CLIP features, generated", "heldout"]
    assert (
        one.metric_value == fid["value"] and one.metric_args["low"] == fid["low"] and one.metric_args["n"] == fid["n"]
    )
    assert one.metric_args["features_sha256"] == report["spaces"][1]["sha256"]
    top5 = report["retrieval"]["train"]["ceiling"]["pixels"]["top5"]
    assert found["Retrieval top5, pixels features, upper bound", "train"].metric_value == top5["value"]

    def with_intervals(tree: Any) -> int:
        if isinstance(tree, dict):
            return 1 if {"low", "high"} <= tree.keys() else sum(map(with_intervals, tree.values()))
        return 0

    # estimates may be nested: none is missing
    sections = ("retrieval", "distribution", "text_fit", "memorization", "reconstruction")
    count = sum(with_intervals(report[section]) for section in sections) + with_intervals(report["text_use"]["gaps"])
    assert len(found) == count
    assert "24 shapes &lt;b&gt;" in card.text


def check_half(kind: Any, folder: Path, ours: LDMPipeline) -> None:
    """`variant="fp16"` loads our weights, rounded."""
    half = kind.from_pretrained(folder, variant="fp16", dtype=torch.float16, use_safetensors=True)
    for name, network in ldm_hub.networks(ours):
        whole, rounded = network.state_dict(), getattr(half, name).state_dict()
        assert rounded.keys() == whole.keys()
        for key, tensor in rounded.items():
            assert torch.equal(tensor, whole[key].half() if whole[key].is_floating_point() else whole[key]), key


def test_stock_diffusers_generates_the_same_from_the_shared_folder_and_its_fp16_variant(
    run: Path, shared: Path
) -> None:
    ours = LDMPipeline.from_pretrained(run / "pipeline")
    words: dict[str, Any] = {"num_inference_steps": 2, "guidance_scale": 3.0, "output_type": "np"}
    expected = ours("red heart", seed=3, **words).images
    stock = DiffusionPipeline.from_pretrained(shared)
    found = stock("red heart", generator=torch.Generator().manual_seed(3), **words).images
    assert (found == expected).all()
    check_half(StableDiffusionPipeline, shared, ours)
    check_half(LDMPipeline, shared, ours)
    rounded = StableDiffusionPipeline.from_pretrained(shared, variant="fp16")  # into float32
    assert rounded.unet.dtype == torch.float32
    drawn = rounded("red heart", generator=torch.Generator().manual_seed(3), **words).images
    assert 0 < abs(drawn - expected).max() < 0.02
    assert model_sha256(LDMPipeline.from_pretrained(shared)) == model_sha256(ours)
    assert png_metadata.read(shared / "pictures/0.png").model == model_sha256(ours)


def test_large_weights_and_their_fp16_variant_are_sharded(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = LDMPipeline.from_pretrained(run / "pipeline")
    monkeypatch.setattr(ldm_hub, "SHARD", "40KB")
    ldm_hub.save_weights(ours, tmp_path)
    for name in ("unet/diffusion_pytorch_model", "text_encoder/model"):
        for variant in ("", ".fp16"):
            assert len(list(tmp_path.glob(f"{name}{variant}-0*-of-*.safetensors"))) > 1
    assert model_sha256(LDMPipeline.from_pretrained(tmp_path)) == model_sha256(ours)
    check_half(StableDiffusionPipeline, tmp_path, ours)


def test_an_evaluation_of_another_model_is_not_shared(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tiny.pipeline(tmp_path / "text", prediction="v")
    other.example_prompts, other.defaults = PROMPTS, FEW
    other.save_pretrained(tmp_path / "other")
    words = ["push", str(tmp_path / "other"), "someone/shapes", *WORDS, "--dry-run", str(tmp_path / "out")]
    with pytest.raises(SystemExit, match="evaluation: .* holds no evaluation of this very model"):
        main([*words, "--evaluation", str(run / "evaluation")])
    main(words)
    assert "the card has no metrics: " in capsys.readouterr().out
    card = ModelCard.load(tmp_path / "out/README.md")
    assert not card.data.eval_results and not (tmp_path / "out/report.html").exists()
    front = yaml.safe_load((tmp_path / "out/README.md").read_text("utf-8").split("---")[1])
    assert [one["text"] for one in front["widget"]] == list(PROMPTS)
    with pytest.raises(SystemExit, match="out: expected an empty folder or none"):
        main(words)


@pytest.mark.parametrize("missing", ["--license", "--data", "--data-license"])
def test_license_and_data_are_required(missing: str, capsys: pytest.CaptureFixture[str]) -> None:
    at = WORDS.index(missing)
    with pytest.raises(SystemExit):
        main(["push", "runs/demo", "someone/shapes", *WORDS[:at], *WORDS[at + 2 :]])
    assert f"required: {missing}" in capsys.readouterr().err
    blank = dict.fromkeys(("license", "data", "data_license"), "mit") | {missing[2:].replace("-", "_"): " "}
    with pytest.raises(ValueError, match="never guessed"):
        Terms(**blank)


def test_push_to_hub_uploads_the_same_as_the_command(hub: Hub, run: Path, shared: Path) -> None:
    pipe = LDMPipeline.from_pretrained(run / "pipeline")
    with pytest.raises(TypeError, match="license"):
        pipe.push_to_hub("someone/shapes")  # type: ignore[call-arg]
    words = {"license": "cc-by-sa-4.0", "data": "24 shapes <b>", "data_license": "cc0-1.0"}
    pipe.push_to_hub("someone/shapes", evaluation=run / "evaluation", **words)
    assert hub.files == files(shared)
    with pytest.raises(ValueError, match="unet: expected a pipeline in float32 to share, got torch.float16"):
        pipe.to(torch.float16).push_to_hub("someone/shapes", **words)


def test_a_push_deletes_the_files_of_the_previous_one(hub: Hub, run: Path, tmp_path: Path) -> None:
    """Metrics of an older model must not stay; files of other origin do."""
    stale = ["report.html", "evaluation.json", "loss_by_t.png", "pictures/7.png", "unet/x-00001-of-00002.safetensors"]
    kept = ["NOTES.md", ".gitattributes", "lora/x.safetensors"]
    hub.files = dict.fromkeys([*stale, *kept], b"stale")
    other = tiny.pipeline(tmp_path / "text", prediction="v")
    with pytest.raises(ValueError, match="evaluation: .* holds no evaluation of this very model"):
        other.push_to_hub("someone/shapes", license="mit", data="x", data_license="mit", evaluation=run / "evaluation")
    assert hub.files["report.html"] == b"stale"
    other.push_to_hub("someone/shapes", license="mit", data="x", data_license="mit")
    assert [name for name, data in hub.files.items() if data == b"stale"] == kept
    assert not {*stale} & hub.files.keys()
    assert json.loads(hub.files["model_index.json"])["_class_name"] == "StableDiffusionPipeline"
    assert "It has not been evaluated" in hub.files["README.md"].decode()


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_a_used_pipeline_is_saved_with_the_same_bytes(
    kind: tiny.Kind, tiny_pipeline_folders: dict[tiny.Kind, Path], tmp_path: Path
) -> None:
    """Loaded, used and saved again."""
    pipe = LDMPipeline.from_pretrained(tiny_pipeline_folders[kind])
    pipe("red heart", num_inference_steps=1)
    pipe.tokenizer(["red", "blue cat"], padding="longest", truncation=True, max_length=5)
    pipe.save_pretrained(tmp_path / "again")
    assert files(tmp_path / "again") == files(tiny_pipeline_folders[kind])


def test_the_card_of_a_class_conditional_model_shows_its_call(tmp_path: Path) -> None:
    pipe = tiny.class_pipeline(tmp_path / "text", ("red", "blue"))
    pipe.defaults = FEW
    ldm_hub.write_model(pipe, tmp_path / "out", "someone/classes", Terms("mit", "shapes", "mit"))
    card = ModelCard.load(tmp_path / "out/README.md")
    assert card.data.pipeline_tag == "unconditional-image-generation" and "widget" not in card.data.to_dict()
    assert 'pipe(class_label="red", seed=7)' in card.text and "DiffusionPipeline" not in card.text
    assert [png_metadata.read(tmp_path / f"out/pictures/{i}.png").class_label for i in (0, 1)] == ["red", "blue"]


def test_the_cards_table_and_limits_are_those_of_the_evaluation(run: Path, shared: Path) -> None:
    report = json.loads((run / "evaluation/evaluation.json").read_text())
    rows = {one.metric: one for one in headline(report)}
    top5 = report["retrieval"]["heldout"]["drawn"]["in-domain CLIP"]["top5"]
    one = rows["Prompt retrieval, top 5 of 24, held-out captions"]
    assert (one.value, one.n) == (f"{top5['value']:.1%}", top5["n"])
    assert one.interval == f"{top5['low']:.1%} to {top5['high']:.1%}"
    near = report["memorization"]["in-domain CLIP"]["train"]["near_copies"]
    assert rows["Near-copies of training pictures, training captions"].value == f"{near['drawn']['value']:.1%}"
    card = ModelCard.load(shared / "README.md").text
    for one in rows.values():
        assert f"| {one.metric} | **{one.value}** | {one.interval} | {one.n} | {one.compare} |" in card
    assert all(f"- {limit}" in card for limit in limits(report, tiny.SIZE))


def test_limits_are_listed_for_a_bad_model_and_not_for_a_good_one(run: Path) -> None:
    report = json.loads((run / "evaluation/evaluation.json").read_text())
    for split, (low, high) in {"train": (0.9, 0.95), "heldout": (0.1, 0.2)}.items():
        for features in ("in-domain CLIP", "pixels"):
            report["retrieval"][split]["drawn"][features]["top5"] |= {"value": low, "low": low, "high": high, "n": 40}
            report["memorization"][features][split]["verdict"] = "some copies"
    report["text_use"]["gaps"]["shuffled"]["total"] |= {"value": 0.01, "low": -0.02, "high": 0.04}
    bad = "\n".join(limits(report, 16))
    assert "not shown to use captions: shuffled captions change the loss by +0.0100 (−0.0200 to +0.0400)" in bad
    assert "less often: top-5 retrieval 10.0% against 90.0%" in bad and "some are of 40 pictures" in bad
    assert bad.count("It copies training pictures") == 4
    for split in ("train", "heldout"):
        for features in ("in-domain CLIP", "pixels"):
            report["retrieval"][split]["drawn"][features]["top5"] |= {"value": 0.8, "low": 0.75, "high": 0.85, "n": 400}
            report["memorization"][features][split]["verdict"] = "no sign of copies"
    report["text_use"]["gaps"]["shuffled"]["total"] |= {"value": 0.03, "low": 0.02, "high": 0.04}
    good = "\n".join(limits(report, 16))
    assert not [word for word in ("not shown", "less often", "copies", "rough") if word in good]
    assert "no safety checker" in good and "16 × 16 pixels" in good
