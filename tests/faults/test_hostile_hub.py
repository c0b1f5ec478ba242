"""Hostile repositories on a Hub: a server on this machine that answers as the Hub does, and the real client.

A fresh process asks for each of them by its id. What is refused, what was fetched for it, and that nothing ran.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import hostile
import pytest
import road
import tiny

COMMIT = "0123456789abcdef0123456789abcdef01234567"
ASK = """
import json, sys
from ldm import LDMPipeline
from ldm.evaluation.features import load_extractor
from ldm.models.text_encoder import TextConfig, TextEncoder
from ldm.models.vae import load_vae
ways = {
    "pipeline": LDMPipeline.from_pretrained,
    "vae": load_vae,
    "text": lambda name: TextEncoder.load(TextConfig(name, MAX_LENGTH)),
    "features": lambda name: load_extractor(name, 16, "cpu"),
}
answers = {}
for name in sys.argv[1:]:
    try:
        ways[name.split("/")[0]](name)
        answers[name] = "loaded"
    except (ValueError, OSError) as error:
        answers[name] = f"{type(error).__name__}: {error}"
print(json.dumps(answers))
""".replace("MAX_LENGTH", str(tiny.MAX_LENGTH))


@dataclass
class Hub:
    """Folders owner/name as repositories, and the paths that were downloaded of them."""

    root: Path
    asked: list[str] = field(default_factory=list)

    def files(self, repository: str) -> list[str]:
        root = self.root / repository
        return sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())


class Handler(BaseHTTPRequestHandler):
    """What the client asks: which files there are, in two ways, and a file."""

    def __init__(self, hub: Hub, *rest: object) -> None:
        self.hub = hub
        super().__init__(*rest)  # type: ignore[arg-type]

    def do_GET(self) -> None:
        path = self.path.split("?")[0].lstrip("/")
        if path.startswith("api/models/"):
            repository = "/".join(path.split("/")[2:4])
            names = self.hub.files(repository)
            if "/tree/" in path:
                sizes = {name: (self.hub.root / repository / name).stat().st_size for name in names}
                tree = [{"type": "file", "path": name, "size": sizes[name], "oid": COMMIT} for name in names]
                return self.answer(json.dumps(tree).encode(), "application/json")
            files = [{"rfilename": name} for name in names]
            told = {"id": repository, "modelId": repository, "sha": COMMIT, "siblings": files}
            return self.answer(json.dumps(told).encode(), "application/json")
        repository, _, name = path.partition("/resolve/")
        file = self.hub.root / repository / name.partition("/")[2]
        if not file.is_file():
            return self.send_error(404)
        if self.command == "GET":
            self.hub.asked.append(f"{repository}: {name.partition('/')[2]}")
        self.answer(file.read_bytes(), "application/octet-stream")

    do_HEAD = do_GET

    def answer(self, body: bytes, kind: str) -> None:
        self.send_response(200)
        for name, value in {
            "Content-Type": kind,
            "Content-Length": str(len(body)),
            "ETag": f'"{hashlib.sha256(body).hexdigest()}"',
            "X-Repo-Commit": COMMIT,
        }.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def answers(
    tiny_pipeline_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[dict[str, str], Hub]]:
    """What asking for each repository ended with, and the Hub that was asked."""
    home = tmp_path_factory.mktemp("hub")
    hub, canary = Hub(home / "repositories"), home / "canary"
    code, evil = hostile.source(canary), hostile.pickled(canary)
    numbers = "unet/diffusion_pytorch_model.safetensors"
    bad = {
        "pipeline/good": lambda folder: None,
        "pipeline/foreign": hostile.both(
            hostile.edit("model_index.json", unet=["evil", "Net"]), hostile.write("unet/evil.py", code)
        ),
        "pipeline/own-class": hostile.both(
            hostile.edit("model_index.json", _class_name=["pipeline", "Evil"]), hostile.write("pipeline.py", code)
        ),
        "pipeline/auto-map": hostile.both(
            hostile.edit("text_encoder/config.json", auto_map={"AutoModel": "evil.Net"}),
            hostile.write("text_encoder/evil.py", code),
        ),
        "pipeline/pickle": hostile.both(
            lambda folder: (folder / numbers).unlink(), hostile.write("unet/diffusion_pytorch_model.bin", evil)
        ),
        "pipeline/renamed-pickle": hostile.write(numbers, evil),
    }
    for name, harm in bad.items():
        harm(shutil.copytree(tiny_pipeline_folder, hub.root / name))
    shutil.copytree(tiny_pipeline_folder / "vae", hub.root / "vae/good")
    shutil.copytree(tiny_pipeline_folder / "vae", hub.root / "vae/other")
    foreign = hostile.edit("config.json", _class_name="EvilAutoencoder", auto_map={"AutoModel": "evil.Net"})
    foreign(hub.root / "vae/other")
    for name in ("text/good", "text/auto-map", "text/pickle", "features/auto-map"):
        tiny.save_text_encoder(hub.root / name, "bert")
        (hub.root / name / "evil.py").write_text(code)
        (hub.root / name / "pytorch_model.bin").write_bytes(evil)
        if name.endswith("auto-map"):
            hostile.edit("config.json", auto_map={"AutoModel": "evil.Net", "AutoConfig": "evil.Net"})(hub.root / name)
        if name.endswith("pickle"):
            (hub.root / name / "model.safetensors").unlink()
    names = sorted(path.relative_to(hub.root).as_posix() for path in hub.root.glob("*/*"))

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, hub))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    told = {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(home / "cache"),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "PYTHONPATH": str(road.ROOT),
        "no_proxy": "127.0.0.1",
    }
    try:
        done = subprocess.run(
            [sys.executable, "-c", ASK, *names], env=os.environ | told, capture_output=True, text=True, timeout=300
        )
    finally:
        server.shutdown()
        server.server_close()
    assert done.returncode == 0, done.stderr[-3000:]
    yield json.loads(done.stdout.splitlines()[-1]), hub
    assert not canary.exists(), "a payload was run"


REFUSED = {
    "pipeline/foreign": "model_index.json: unet: expected diffusers's UNet2DConditionModel",
    "pipeline/own-class": "model_index.json: _class_name: expected ",
    "pipeline/auto-map": "text_encoder/config.json: auto_map: ",
    "pipeline/pickle": "OSError: ",
    "pipeline/renamed-pickle": "diffusion_pytorch_model.safetensors: expected whole safetensors",
    "vae/other": "config.json: auto_map: ",
    "text/auto-map": "config.json: auto_map: ",
    "text/pickle": "OSError: ",
    "features/auto-map": "config.json: auto_map: ",
}


def test_good_repositories_are_loaded(answers: tuple[dict[str, str], Hub]) -> None:
    rest = {name: said for name, said in answers[0].items() if name not in REFUSED}
    assert rest == dict.fromkeys(("pipeline/good", "vae/good", "text/good"), "loaded")


@pytest.mark.parametrize("name", REFUSED)
def test_a_hostile_repository_is_refused(name: str, answers: tuple[dict[str, str], Hub]) -> None:
    assert REFUSED[name] in answers[0][name]


def test_code_and_pickles_are_not_even_fetched(answers: tuple[dict[str, str], Hub]) -> None:
    hub = answers[1]
    assert len(hub.asked) > 40
    assert not [path for path in hub.asked if path.endswith((".py", ".bin"))]


@pytest.mark.parametrize("name", ["pipeline/foreign", "pipeline/own-class"])
def test_of_a_foreign_pipeline_nothing_but_its_index_is_fetched(name: str, answers: tuple[dict[str, str], Hub]) -> None:
    assert [path for path in answers[1].asked if path.startswith(name)] == [f"{name}: model_index.json"]
