"""A stand-in for the Hub: the few requests with which a model is made and committed to, weights by LFS."""

from __future__ import annotations

import base64
import json
import re
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

REPO = "someone/shapes"


class Hub(ThreadingHTTPServer):
    """What one repository holds.

    Attributes:
        files: by path.
        made: what it was asked to make.
        cards: the cards that it was asked to validate.
        refused: the requests that it doesn't know.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.files: dict[str, bytes] = {}
        self.made: dict[str, Any] = {}
        self.cards: list[str] = []
        self.stored: dict[str, bytes] = {}  # LFS objects by SHA-256
        self.refused: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Answer(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = self.body()
        match self.path.split("?")[0]:
            case "/api/repos/create":
                self.server.made = json.loads(body)
                self.answer({"url": f"{self.server.url}/{REPO}"})
            case "/api/validate-yaml":
                self.server.cards.append(json.loads(body)["content"])
                self.answer({"errors": [], "warnings": []})
            case path if path == f"/api/models/{REPO}/preupload/main":
                self.answer({"files": [upload_mode(one["path"]) for one in json.loads(body)["files"]]})
            case path if path == f"/{REPO}.git/info/lfs/objects/batch":
                asked = json.loads(body)["objects"]
                self.answer({"transfer": "basic", "objects": [self.upload(one) for one in asked]})
            case path if path == f"/api/models/{REPO}/commit/main":
                self.commit([json.loads(row) for row in body.splitlines()])
                url = f"{self.server.url}/{REPO}/commit/0"
                self.answer({"commitUrl": url, "commitOid": "0" * 40, "success": True})
            case path:
                self.refuse(path)

    def do_PUT(self) -> None:
        self.server.stored[self.path.removeprefix("/lfs/")] = self.body()
        self.answer({})

    def do_GET(self) -> None:
        if self.path.startswith(f"/api/models/{REPO}/tree/main"):
            rows = [{"type": "file", "path": path, "size": len(data), "oid": "0" * 40}
                    for path, data in self.server.files.items()]  # fmt: skip
            self.answer(rows)
        else:
            self.refuse(self.path)

    def upload(self, asked: dict[str, Any]) -> dict[str, Any]:
        return {**asked, "actions": {"upload": {"href": f"{self.server.url}/lfs/{asked['oid']}", "header": {}}}}

    def commit(self, rows: list[dict[str, Any]]) -> None:
        for row in rows:
            value = row["value"]
            if row["key"] == "file":
                self.server.files[value["path"]] = base64.b64decode(value["content"])
            elif row["key"] == "lfsFile":
                self.server.files[value["path"]] = self.server.stored[value["oid"]]
            elif row["key"] == "deletedFile":
                del self.server.files[value["path"]]

    def body(self) -> bytes:
        if length := self.headers.get("Content-Length"):
            return self.rfile.read(int(length))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def answer(self, told: Any) -> None:
        data = json.dumps(told).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def refuse(self, path: str) -> None:
        self.server.refused.append(f"{self.command} {path}")
        self.send_error(404, path)

    def log_message(self, *args: Any) -> None:
        pass


def upload_mode(path: str) -> dict[str, Any]:
    """Weights go by LFS, as .gitattributes of a new repository has it."""
    mode = "lfs" if re.search(r"\.(safetensors|png)$", path) else "regular"
    return {"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": None}
