"""The report: OUT/report.html, one self-contained file without scripts.

It is made from the files in OUT alone (evaluation.json, the pictures named there, and run.json and nll.json if there
are any), so it can be made again at any time. Captions are untrusted text: the template escapes all values, and the
page's content security policy forbids scripts and requests.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import jinja2
from PIL import Image

from ldm.data.batches import spread
from ldm.evaluation.provenance import RUN_FILE
from ldm.evaluation.report.charts import report_charts
from ldm.evaluation.report.text import by_guidance, kinds_of, number, percent, sampling, seed_results, signed
from ldm.models.lora import STUDENT_FOLDER

FILE = "evaluation.json"
PAGE = "report.html"
SMALL = 128  # edge in pixels up to which a picture is embedded as it is; larger ones are reduced
REDUCED = 192  # edge of these
KINDS = {"compositions": "New compositions", "others": "Held-out captions"}
GALLERY, ROW = 24, 8  # pictures of a gallery, and of a row of examples


def write_report(out: Path) -> Path:
    """Make OUT/report.html from the files in OUT; returns its path.

    Raises:
        FileNotFoundError: without OUT/evaluation.json, or a picture named there.
    """
    unfinished = (out / PAGE).with_suffix(".new")
    unfinished.write_text(render(out), "utf-8")
    unfinished.rename(out / PAGE)
    return out / PAGE


def render(out: Path, redact: Callable[[Any], Any] = lambda tree: tree) -> str:
    """The page's HTML; `redact` is applied to the content of each JSON file."""
    return templates().get_template("report.html").render(view(out, redact))


def templates() -> jinja2.Environment:
    """The templates of the pages, which escape all values."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": percent, "number": number, "signed": signed, "dotted": dotted}
    return environment


def view(out: Path, redact: Callable[[Any], Any] = lambda tree: tree) -> dict[str, Any]:
    """The template's variables."""
    report = redact(read_json(out / FILE))
    run = redact(read_json(out / RUN_FILE)) if (out / RUN_FILE).exists() else None
    nll = redact(read_json(out / "nll.json")) if (out / "nll.json").exists() else None
    if nll and nll.get("model") != report["model"]["sha256"]:
        nll = None  # another model's
    extractor = report["spaces"][-1]["name"]  # a network, if there is one
    split = list(report["pictures"])[-1]  # held-out captions, if there are any
    pictures = report["pictures"][split]
    ranked = sorted(pictures, key=lambda picture: (picture["rank"][extractor], picture["number"]))
    half = min(ROW, len(ranked) // 2)
    nearest = sorted(pictures, key=lambda picture: picture["nearest_training"][extractor]["distance"])
    return {
        "report": report,
        "run": run,
        "nll": nll,
        "name": model_name(report["model"]["folder"]),
        "sampling": sampling(*(report["settings"][key] for key in ("steps", "guidance_scale", "guidance_interval"))),
        "extractor": extractor,
        "split": split,
        "galleries": galleries(report),
        "best": ranked[:half],
        "worst": ranked[::-1][:half],
        "nearest": nearest[:ROW],
        "rebuilt": [pictures[i] for i in spread(len(pictures), ROW) if "reconstructed" in pictures[i]],
        "charts": report_charts(report, run, nll),
        "picture": lru_cache(None)(lambda name: inline_picture(out / name)),
        "seeds": seed_results(report),
        "seed_rows": seed_rows(report),
        "sweep_rows": by_guidance(report["sweep"]["rows"]) if "sweep" in report else {},
        "small": report["model"]["size"] <= SMALL,
        "heat": heat,
        "kinds_of": kinds_of,
    }


def read_json(path: Path) -> Any:
    """The content of a JSON file."""
    return json.loads(path.read_text("utf-8"))


def model_name(folder: str) -> str:
    """The model's name: RUN for RUN/pipeline, MODEL/few_steps for its student, else the name of the folder."""
    path = Path(folder)
    if path.name == STUDENT_FOLDER and path.parent.name:
        return f"{model_name(str(path.parent))}/{STUDENT_FOLDER}"
    return path.parent.name or path.name if path.name == "pipeline" else path.name


def galleries(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The generated pictures to show, by kind of caption: a fixed number, spread evenly, not selected."""
    kinds: dict[str, list[dict[str, Any]]] = {}
    for picture in report["pictures"].get("heldout", []):
        kinds.setdefault(KINDS.get(picture["kind"], f"Held-out captions: {picture['kind']}"), []).append(picture)
    kinds["Training captions"] = report["pictures"].get("train", [])
    return {
        kind: {"of": len(found), "shown": [found[i] for i in spread(len(found), GALLERY)]}
        for kind, found in kinds.items()
        if found
    }


def seed_rows(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Some prompts with a few of their seeds: spread evenly, not selected."""
    if "seeds" not in report:
        return []
    found = report["seeds"]
    each = len(found["pictures"]) // len(found["captions"])
    return [
        {"caption": found["captions"][i], "pictures": found["pictures"][i * each : i * each + min(each, ROW)]}
        for i in spread(len(found["captions"]), GALLERY // 2)
    ]


def inline_picture(path: Path) -> str:
    """A picture file as a data URI: lossless if small, else reduced to the size of its display."""
    with Image.open(path) as opened:
        picture = opened.convert("RGB")
    lossless = max(picture.size) <= SMALL
    if not lossless:
        picture.thumbnail((REDUCED, REDUCED), Image.Resampling.LANCZOS)
    packed = io.BytesIO()
    picture.save(packed, "WEBP", lossless=lossless, quality=85, method=6)
    return "data:image/webp;base64," + base64.b64encode(packed.getvalue()).decode()


def heat(value: float, values: list[float]) -> int:
    """A value's place between the smallest and the largest, from 0 to 100."""
    low, high = min(values), max(values)
    return round(100 * (value - low) / (high - low)) if high > low else 0


def dotted(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings with dotted keys, as on the command line."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            found |= dotted(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = ", ".join(map(str, value)) if isinstance(value, list) else value
    return found
