"""An evaluation to look at: OUT/report.html, one file that needs no other and no network.

It is made of what lies in OUT (evaluation.json, the pictures it names, and run.json and nll.json where there are
some), so it can be made again at any time. Captions are anybody's text: the template escapes whatever it is given,
and the page's own security policy lets no script run and nothing be fetched.
"""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import jinja2
from PIL import Image

from ldm.data.batches import spread
from ldm.evaluation import run_record
from ldm.evaluation.report.curves import charts
from ldm.evaluation.sweep import lines

FILE = "evaluation.json"
PAGE = "report.html"
SMALL = 128  # edge in pixels up to which a picture is shown to the pixel; a larger one is made smaller
SHOWN = 192  # edge of these
GRID, ROW = 24, 8  # pictures of a section, and of one that makes a point


def write_report(out: Path) -> Path:
    """Make OUT/report.html of what lies in OUT; returns its path.

    Raises:
        FileNotFoundError: without OUT/evaluation.json, or a picture that it names.
    """
    unfinished = (out / PAGE).with_suffix(".new")
    unfinished.write_text(render(out), "utf-8")
    unfinished.rename(out / PAGE)
    return out / PAGE


def render(out: Path, told: Callable[[Any], Any] = lambda tree: tree) -> str:
    """The page, of what lies in OUT, each JSON file seen through `told`."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"share": share, "figure": figure, "signed": signed, "flat": flat}
    return environment.get_template("report.html").render(view(out, told))


def view(out: Path, told: Callable[[Any], Any] = lambda tree: tree) -> dict[str, Any]:
    """All that the template shows."""
    report = told(read(out / FILE))
    run = told(read(out / run_record.FILE)) if (out / run_record.FILE).exists() else None
    nll = told(read(out / "nll.json")) if (out / "nll.json").exists() else None
    if nll and nll.get("model") != report["model"]["sha256"]:
        nll = None  # another model's
    space = report["spaces"][-1]["name"]  # the net, where there is one
    judged = list(report["pictures"])[-1]  # the held-out captions, where there are some
    pictures = report["pictures"][judged]
    ranked = sorted(pictures, key=lambda picture: (picture["rank"][space], picture["number"]))
    half = min(ROW, len(ranked) // 2)
    nearest = sorted(pictures, key=lambda picture: picture["nearest_training"][space]["distance"])
    return {
        "report": report,
        "run": run,
        "nll": nll,
        "name": model_name(report["model"]["folder"]),
        "space": space,
        "judged": judged,
        "drawings": drawings(report),
        "best": ranked[:half],
        "worst": ranked[::-1][:half],
        "nearest": nearest[:ROW],
        "rebuilt": [pictures[i] for i in spread(len(pictures), ROW) if "reconstructed" in pictures[i]],
        "charts": charts(report, run, nll),
        "picture": lru_cache(None)(lambda name: inline(out / name)),
        "sweep_lines": lines(report["sweep"]["rows"]) if "sweep" in report else {},
        "small": report["model"]["size"] <= SMALL,
        "heat": heat,
    }


def read(path: Path) -> Any:
    """A JSON file."""
    return json.loads(path.read_text("utf-8"))


def model_name(folder: str) -> str:
    """What to call a model: RUN for RUN/pipeline, else the folder's own name."""
    path = Path(folder)
    return path.parent.name or path.name if path.name == "pipeline" else path.name


def drawings(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Which pictures are shown as what the model draws: of each kind of caption some, spread evenly, none chosen."""
    heldout = report["pictures"].get("heldout", [])
    kinds = {
        "New compositions": [picture for picture in heldout if picture["composition"]],
        "Held-out captions": [picture for picture in heldout if not picture["composition"]],
        "Training captions": report["pictures"].get("train", []),
    }
    return {
        kind: {"of": len(found), "shown": [found[i] for i in spread(len(found), GRID)]}
        for kind, found in kinds.items()
        if found
    }


def inline(path: Path) -> str:
    """A picture file as a data URI: lossless where it is small, else no larger than it is shown."""
    with Image.open(path) as opened:
        picture = opened.convert("RGB")
    lossless = max(picture.size) <= SMALL
    if not lossless:
        picture.thumbnail((SHOWN, SHOWN), Image.Resampling.LANCZOS)
    packed = io.BytesIO()
    picture.save(packed, "WEBP", lossless=lossless, quality=85, method=6)
    return "data:image/webp;base64," + base64.b64encode(packed.getvalue()).decode()


def heat(value: float, values: list[float], largest_is_best: bool = True) -> int:
    """Where a value lies among others, from 0 (the worst) to 100 (the best)."""
    low, high = min(values), max(values)
    place = (value - low) / (high - low) if high > low else 0.0
    return round(100 * (place if largest_is_best else 1 - place))


def share(value: float, digits: int = 1) -> str:
    """0.25 => 25.0%."""
    return f"{value:.{digits}%}"


def figure(value: float, digits: int = 3) -> str:
    """A number with so many digits that count, without an exponent where it can be read: 0.0123, 46.4, 1,740."""
    least = digits - 1 - math.floor(math.log10(abs(value))) if value else digits - 1
    return f"{value:,.{max(0, least)}f}".replace("-", "−") if least < 8 else f"{value:.{digits - 1}e}"


def signed(value: float, digits: int = 4) -> str:
    """A difference."""
    return f"{value:+.{digits}f}".replace("-", "−")


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as dotted ones, as they are typed."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = ", ".join(map(str, value)) if isinstance(value, list) else value
    return found
