"""What is shared: a card that the Hub's own parser reads, and the very bytes, at a stand-in for the Hub."""

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
from ldm.sharing import png_metadata as recipe
from ldm.sharing.figures import headline, limits
from ldm.sharing.model_card import Terms
from ldm.training.config import to_dict

FEW = Defaults(num_inference_steps=2)
WORDS = ["--license", "cc-by-sa-4.0", "--data", "24 shapes <b>", "--data-license", "cc0-1.0"]
PROMPTS = ("red heart", "cat <b>")
USER = "ada lovelace"  # whose home the tests' folders lie in


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
    """An evaluated run, in somebody's home."""
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
    """And online: the dry run was offline, which transformers would write down."""
    main(["push", str(run), "someone/shapes", *WORDS, "--private"])
    told = capsys.readouterr().out
    assert "uploaded to " in told and "someone/shapes" in told
    assert hub.made["name"] == "shapes" and hub.made["organization"] == "someone"
    assert hub.made.get("visibility") == "private" or hub.made.get("private") is True  # by version
    expected = files(shared)
    assert hub.files.keys() == expected.keys()
    assert [name for name in expected if hub.files[name] != expected[name]] == []
    assert {"README.md", "report.html", "evaluation.json", "gallery.png", "loss_by_t.png"} <= expected.keys()
    assert {"pictures/0.png", "unet/diffusion_pytorch_model.fp16.safetensors"} <= expected.keys()
    ModelCard.load(shared / "README.md").validate()
    assert len(hub.cards) >= 2 and set(hub.cards) == {expected["README.md"].decode()}  # committed, and validate()


def test_no_path_and_no_user_name_leaves(run: Path, shared: Path) -> None:
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
    told = json.loads((shared / "evaluation.json").read_text("utf-8"))
    assert told["model"]["folder"] == "run/pipeline" and told["data"]["source"] == "data"
    assert told["pictures"]["train"][0]["where"].startswith("data/metadata.jsonl row ")
    assert "ldm evaluate 'run' --quick" in told["command"] and '"source": "data"' in card and "<h1>run</h1>" in page
    assert files(run / "evaluation") == before  # one's own stays as it was


def test_the_hubs_own_parser_reads_every_figure(run: Path, shared: Path) -> None:
    card = ModelCard.load(shared / "README.md")
    data = card.data
    assert (data.license, data.library_name, data.pipeline_tag) == ("cc-by-sa-4.0", "diffusers", "text-to-image")
    assert data.to_dict()["training_data_license"] == "cc0-1.0"
    assert data.to_dict()["widget"] == [{"text": "red heart", "output": {"url": "pictures/0.png"}}]
    told = json.loads((run / "evaluation/evaluation.json").read_text())
    found = {(one.metric_name, one.dataset_split): one for one in data.eval_results}
    assert len(found) == len(data.eval_results)
    fid = told["distribution"]["own"]["drawn"]["fid"]
    one = found["FID in own, drawn", "heldout"]
    assert (
        one.metric_value == fid["value"] and one.metric_args["low"] == fid["low"] and one.metric_args["n"] == fid["n"]
    )
    assert one.metric_args["space_sha256"] == told["spaces"][1]["sha256"]
    top5 = told["retrieval"]["train"]["ceiling"]["pixels"]["top5"]
    assert found["Retrieval top5 in pixels, ceiling", "train"].metric_value == top5["value"]

    def with_intervals(tree: Any) -> int:
        if isinstance(tree, dict):
            return 1 if {"low", "high"} <= tree.keys() else sum(map(with_intervals, tree.values()))
        return 0

    # retrieval's figures have figures of their own among them: none is missing
    sections = ("retrieval", "distribution", "text_fit", "memorization", "reconstruction")
    count = sum(with_intervals(told[section]) for section in sections) + with_intervals(told["text_use"]["gaps"])
    assert len(found) == count
    assert "24 shapes &lt;b&gt;" in card.text


def check_half(kind: Any, folder: Path, ours: LDMPipeline) -> None:
    """What `variant="fp16"` loads is ours, rounded."""
    half = kind.from_pretrained(folder, variant="fp16", dtype=torch.float16, use_safetensors=True)
    for name, network in ldm_hub.networks(ours):
        whole, told = network.state_dict(), getattr(half, name).state_dict()
        assert told.keys() == whole.keys()
        for key, tensor in told.items():
            assert torch.equal(tensor, whole[key].half() if whole[key].is_floating_point() else whole[key]), key


def test_stock_diffusers_draws_from_what_is_shared_and_from_its_half(run: Path, shared: Path) -> None:
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
    assert recipe.read(shared / "pictures/0.png").model == model_sha256(ours)


def test_large_weights_are_in_shards_and_their_half_too(
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


def test_an_evaluation_of_another_model_is_not_passed_on(
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
def test_what_only_the_owner_knows_is_asked_for(missing: str, capsys: pytest.CaptureFixture[str]) -> None:
    at = WORDS.index(missing)
    with pytest.raises(SystemExit):
        main(["push", "runs/demo", "someone/shapes", *WORDS[:at], *WORDS[at + 2 :]])
    assert f"required: {missing}" in capsys.readouterr().err
    blank = dict.fromkeys(("license", "data", "data_license"), "mit") | {missing[2:].replace("-", "_"): " "}
    with pytest.raises(ValueError, match="never guessed"):
        Terms(**blank)


def test_the_pipeline_pushes_itself_as_the_command_does(hub: Hub, run: Path, shared: Path) -> None:
    pipe = LDMPipeline.from_pretrained(run / "pipeline")
    with pytest.raises(TypeError, match="license"):
        pipe.push_to_hub("someone/shapes")  # type: ignore[call-arg]
    words = {"license": "cc-by-sa-4.0", "data": "24 shapes <b>", "data_license": "cc0-1.0"}
    pipe.push_to_hub("someone/shapes", evaluation=run / "evaluation", **words)
    assert hub.files == files(shared)
    with pytest.raises(ValueError, match="unet: expected a pipeline in float32 to share, got torch.float16"):
        pipe.to(torch.float16).push_to_hub("someone/shapes", **words)


def test_a_push_leaves_nothing_of_the_last_one(hub: Hub, run: Path, tmp_path: Path) -> None:
    """Figures of another model would be taken for this one's; what others put there is theirs."""
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
def test_a_saved_pipeline_tells_nothing_of_its_life(
    kind: tiny.Kind, tiny_pipeline_folders: dict[tiny.Kind, Path], tmp_path: Path
) -> None:
    """Loaded, drawn from and saved again: the same bytes."""
    pipe = LDMPipeline.from_pretrained(tiny_pipeline_folders[kind])
    pipe("red heart", num_inference_steps=1)
    pipe.tokenizer(["red", "blue cat"], padding="longest", truncation=True, max_length=5)
    pipe.save_pretrained(tmp_path / "again")
    assert files(tmp_path / "again") == files(tiny_pipeline_folders[kind])


def test_a_model_of_classes_is_shared_with_how_to_ask_it(tmp_path: Path) -> None:
    pipe = tiny.class_pipeline(tmp_path / "text", ("red", "blue"))
    pipe.defaults = FEW
    ldm_hub.write_model(pipe, tmp_path / "out", "someone/classes", Terms("mit", "shapes", "mit"))
    card = ModelCard.load(tmp_path / "out/README.md")
    assert card.data.pipeline_tag == "unconditional-image-generation" and "widget" not in card.data.to_dict()
    assert 'pipe(class_label="red", seed=7)' in card.text and "DiffusionPipeline" not in card.text
    assert [recipe.read(tmp_path / f"out/pictures/{i}.png").class_label for i in (0, 1)] == ["red", "blue"]


def test_the_cards_table_and_its_limits_are_what_was_measured(run: Path, shared: Path) -> None:
    told = json.loads((run / "evaluation/evaluation.json").read_text())
    lines = {one.question: one for one in headline(told)}
    top5 = told["retrieval"]["heldout"]["drawn"]["own"]["top5"]
    one = lines["Draws what was asked: top 5 of 24, held-out captions"]
    assert (one.value, one.n) == (f"{top5['value']:.1%}", top5["n"])
    assert one.interval == f"{top5['low']:.1%} to {top5['high']:.1%}"
    near = told["memorization"]["own"]["train"]["near_copies"]
    assert lines["Copies: near-copies of training pictures, training captions"].value == f"{near['drawn']['value']:.1%}"
    card = ModelCard.load(shared / "README.md").text
    for one in lines.values():
        assert f"| {one.question} | **{one.value}** | {one.interval} | {one.n} | {one.beside} |" in card
    assert all(f"- {limit}" in card for limit in limits(told, tiny.SIZE))


def test_limits_are_told_of_a_bad_model_and_not_of_a_good_one(run: Path) -> None:
    told = json.loads((run / "evaluation/evaluation.json").read_text())
    for split, (low, high) in {"train": (0.9, 0.95), "heldout": (0.1, 0.2)}.items():
        for judge in ("own", "pixels"):
            told["retrieval"][split]["drawn"][judge]["top5"] |= {"value": low, "low": low, "high": high, "n": 40}
            told["memorization"][judge][split]["verdict"] = "some copies"
    told["text_use"]["gaps"]["shuffled"]["total"] |= {"value": 0.01, "low": -0.02, "high": 0.04}
    bad = "\n".join(limits(told, 16))
    assert "That it reads captions is not shown: another's caption adds +0.0100 (−0.0200 to +0.0400)" in bad
    assert "come out right less often: 10.0% against 90.0%" in bad and "some come from 40 pictures" in bad
    assert bad.count("It copies training pictures") == 4
    for split in ("train", "heldout"):
        for judge in ("own", "pixels"):
            told["retrieval"][split]["drawn"][judge]["top5"] |= {"value": 0.8, "low": 0.75, "high": 0.85, "n": 400}
            told["memorization"][judge][split]["verdict"] = "no sign of copies"
    told["text_use"]["gaps"]["shuffled"]["total"] |= {"value": 0.03, "low": 0.02, "high": 0.04}
    good = "\n".join(limits(told, 16))
    assert not [word for word in ("not shown", "less often", "copies", "rough") if word in good]
    assert "no safety checker" in good and "16 × 16 pixels" in good
