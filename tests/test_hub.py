"""What is shared: a card that the Hub's own parser reads, and the very bytes, at a stand-in for the Hub."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import road
import tiny
import torch
import yaml
from diffusers import DiffusionPipeline
from huggingface_hub import ModelCard

from ldm import recipe
from ldm.cli import main
from ldm.hub_card import Terms
from ldm.models.fingerprint import model_sha256
from ldm.pipeline import LDMPipeline

WORDS = ["--license", "cc-by-sa-4.0", "--data", "24 shapes <b>", "--data-license", "cc0-1.0"]
PROMPTS = ("red heart", "cat <b>")


class Hub(ThreadingHTTPServer):
    """Accepts what the Hub accepts when a model is made and committed to, and remembers it."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.files: dict[str, bytes] = {}
        self.made: dict[str, Any] = {}
        self.cards: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Answer(BaseHTTPRequestHandler):
    server: Hub

    def do_POST(self) -> None:
        length = self.headers.get("Content-Length")
        body = self.rfile.read(int(length)) if length else self.chunks()
        path = self.path.split("?")[0]
        if path == "/api/repos/create":
            self.server.made = json.loads(body)
            self.answer({"url": f"{self.server.url}/someone/shapes"})
        elif path == "/api/validate-yaml":
            self.server.cards.append(json.loads(body)["content"])
            self.answer({"errors": [], "warnings": []})
        elif path == "/api/models/someone/shapes/preupload/main":
            named = [{"path": one["path"], "uploadMode": "regular", "shouldIgnore": False, "oid": None}
                     for one in json.loads(body)["files"]]  # fmt: skip
            self.answer({"files": named})
        elif path == "/api/models/someone/shapes/commit/main":
            for row in map(json.loads, body.splitlines()):
                if row["key"] == "file":
                    self.server.files[row["value"]["path"]] = base64.b64decode(row["value"]["content"])
            self.answer(
                {"commitUrl": f"{self.server.url}/someone/shapes/commit/0", "commitOid": "0" * 40, "success": True}
            )
        else:
            self.send_error(404, path)

    def chunks(self) -> bytes:
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def answer(self, told: dict[str, Any]) -> None:
        data = json.dumps(told).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    server = Hub()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def at(hub: Hub, code: str) -> str:
    """Run Python in a process whose Hub is the stand-in."""
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1",
                   "HF_TOKEN": "hf_nobody", "PYTHONPATH": str(road.ROOT)}  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An evaluated run."""
    folder = tmp_path_factory.mktemp("hub")
    pipeline = tiny.pipeline(folder / "text")
    pipeline.example_prompts = PROMPTS[:1]
    pipeline.save_pretrained(folder / "run/pipeline")
    road.draw_folder(folder / "data")
    words = [
        "--data",
        str(folder / "data"),
        "--quick",
        "--steps",
        "1",
        "--net",
        str(folder / "net"),
        "--holdout",
        "0.3",
    ]
    main(
        ["evaluate", str(folder / "run"), *words, "--fit-net", "--net-epochs", "1", "--net-text", str(folder / "text")]
    )
    return folder / "run"


@pytest.fixture(scope="module")
def shared(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dry") / "out"
    main(["push", str(run), "someone/shapes", *WORDS, "--dry-run", str(out)])
    return out


def files(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_the_very_bytes_arrive_and_the_dry_run_shows_them(hub: Hub, run: Path, shared: Path) -> None:
    words = ["push", str(run), "someone/shapes", *WORDS, "--private"]
    told = at(hub, f"from ldm.cli import main; main({words!r})")
    assert "it is at " in told and "someone/shapes" in told
    assert hub.made["name"] == "shapes" and hub.made["organization"] == "someone"
    assert hub.made.get("visibility") == "private" or hub.made.get("private") is True  # by version
    expected = files(shared)
    assert hub.files.keys() == expected.keys()
    # transformers writes into tokenizer_config.json what its process has done with the tokenizer
    told_apart = {name for name in expected if hub.files[name] != expected[name]}
    assert told_apart <= {"tokenizer/tokenizer_config.json"}
    assert {"README.md", "report.html", "evaluation.json", "gallery.png", "loss_by_t.png"} <= expected.keys()
    assert {"pictures/0.png", "unet/diffusion_pytorch_model.fp16.safetensors"} <= expected.keys()
    at(hub, f"from huggingface_hub import ModelCard; ModelCard.load({str(shared / 'README.md')!r}).validate()")
    assert len(hub.cards) >= 2 and set(hub.cards) == {expected["README.md"].decode()}  # committed, and validate()


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


def test_stock_diffusers_draws_from_what_is_shared_and_from_its_half(run: Path, shared: Path) -> None:
    ours = LDMPipeline.from_pretrained(run / "pipeline")
    words: dict[str, Any] = {"num_inference_steps": 2, "guidance_scale": 3.0, "output_type": "np"}
    expected = ours("red heart", seed=3, **words).images
    stock = DiffusionPipeline.from_pretrained(shared)
    found = stock("red heart", generator=torch.Generator().manual_seed(3), **words).images
    assert (found == expected).all()
    half = DiffusionPipeline.from_pretrained(shared, variant="fp16", dtype=torch.float16)
    for name in ("unet", "vae", "text_encoder"):
        whole = getattr(ours, name).state_dict()
        for key, tensor in getattr(half, name).state_dict().items():
            expected_tensor = whole[key].half() if whole[key].is_floating_point() else whole[key]
            assert torch.equal(tensor, expected_tensor), key
    assert model_sha256(LDMPipeline.from_pretrained(shared)) == model_sha256(ours)
    assert recipe.read(shared / "pictures/0.png").model == model_sha256(ours)


def test_an_evaluation_of_another_model_is_not_passed_on(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tiny.pipeline(tmp_path / "text", prediction="v")
    other.example_prompts = PROMPTS
    other.save_pretrained(tmp_path / "other")
    words = ["push", str(tmp_path / "other"), "someone/shapes", *WORDS, "--dry-run", str(tmp_path / "out")]
    with pytest.raises(SystemExit, match="--evaluation: .* holds no evaluation of this very model"):
        main([*words, "--evaluation", str(run / "evaluation")])
    main(words)
    assert "no figures: " in capsys.readouterr().out
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


def test_the_pipeline_pushes_itself(hub: Hub, run: Path) -> None:
    pipe = LDMPipeline.from_pretrained(run / "pipeline")
    with pytest.raises(TypeError, match="license"):
        pipe.push_to_hub("someone/shapes")  # type: ignore[call-arg]
    hub.files.clear()
    at(hub, f"""
from ldm import LDMPipeline
pipe = LDMPipeline.from_pretrained({str(run / "pipeline")!r})
pipe.push_to_hub("someone/shapes", license="mit", data="shapes", data_license="mit")
""")  # fmt: skip
    assert json.loads(hub.files["model_index.json"])["_class_name"] == "StableDiffusionPipeline"
    assert "report.html" not in hub.files and np.frombuffer(hub.files["gallery.png"], np.uint8).size > 0
