"""The report of `ldm evaluate`: it shows the numbers of the JSON, is self-contained, and escapes untrusted text."""

from __future__ import annotations

import base64
import copy
import io
import json
import re
import shutil
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import road
import tiny
from PIL import Image

from ldm.cli.main import main
from ldm.evaluation.report.charts import Series, inline_svg, line_chart
from ldm.evaluation.report.page import write_report
from ldm.evaluation.report.text import number, sampling

EVIL = '"><script>alert(1)</script><img src=x onerror=alert(2)> {{ 7 * 7 }}'


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run, evaluated once with all options; one of its captions is hostile."""
    folder = tmp_path_factory.mktemp("report")
    tiny.pipeline(folder / "text").save_pretrained(folder / "run/pipeline")
    data = road.draw_folder(folder / "data")
    rows = [json.loads(line) for line in (data / "metadata.jsonl").read_text().splitlines()]
    for i, row in enumerate(rows):
        row |= {"split": "heldout" if i % 3 == 0 else "train", "composition": i in (0, 6)}
    rows[3]["text"] = EVIL
    (data / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    checkpoint = folder / "run/checkpoints/step_0000004"
    checkpoint.mkdir(parents=True)
    config = {"data": {"source": str(data), "size": 16}, "optim": {"lr": 0.00125}}
    (checkpoint / "state.json").write_text(json.dumps({"step": 4, "config": config}))
    log = [{"step": s, "loss": 1 / s, "heldout/q1": 2 / s, "heldout/text_gap": s / 100} for s in (1, 2, 3, 4)]
    (folder / "run/log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in log) + '{"step": 5, "lo')
    net = ["--fit-net", "--net-epochs", "1", "--net-text", str(folder / "text"), "--net", str(folder / "net")]
    grid = ["--sweep", "--sweep-guidance", "1", "2", "--sweep-steps", "1", "--sweep-pictures", "4"]
    main(["evaluate", str(folder / "run"), "--quick", "--steps", "1", "--seeds", "2", *net, *grid])
    main(["evaluate", str(folder / "run"), "--nll", "--strata", "3"])
    return folder


@pytest.fixture
def out(home: Path, tmp_path: Path) -> Path:
    return shutil.copytree(home / "run/evaluation", tmp_path / "out")


class Parsed(HTMLParser):
    """Tags with their attributes, and text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", "".join(self.texts))


def parsed(out: Path) -> Parsed:
    return Parsed((out / "report.html").read_text("utf-8"))


def report(out: Path) -> dict[str, Any]:
    return json.loads((out / "evaluation.json").read_text("utf-8"))


def test_the_numbers_are_those_of_the_json(out: Path) -> None:
    text, data = parsed(out).text, report(out)
    for set_ in ("train", "heldout"):
        for features in ("pixels", "in-domain CLIP"):
            for top in ("top1", "top5"):
                found = data["retrieval"][set_]["drawn"][features][top]
                assert f"{found['value']:.1%} {found['low']:.1%} to {found['high']:.1%}" in text
    for kind in ("drawn", "floor"):
        fid = data["distribution"]["in-domain CLIP"][kind]["fid"]
        assert f"{number(fid['value'])} {number(fid['low'])} to {number(fid['high'])}" in text
    assert "new compositions" in text and data["memorization"]["in-domain CLIP"]["heldout"]["verdict"] in text
    for known in (data["model"]["sha256"], data["data"]["sha256"], data["spaces"][1]["sha256"], data["command"]):
        assert known in text
    assert data["command"].startswith("ldm evaluate ") and data["machine"]["processor"] in text
    assert "optim.lr 0.00125" in text
    best = data["sweep"]["best"]
    assert f"guidance {best['guidance_scale']:g}" in text
    assert "1 steps, guidance for t/T in [0.2, 0.8)" in text


def test_embedded_pictures_equal_the_files(out: Path) -> None:
    data = report(out)
    shown = []
    for tag, attributes in parsed(out).tags:
        if tag == "img":
            kind, _, code = str(attributes["src"]).partition(";base64,")
            assert kind == "data:image/webp"
            shown.append(np.asarray(Image.open(io.BytesIO(base64.b64decode(code))).convert("RGB")).tobytes())
    for picture in data["pictures"]["heldout"]:
        for name in ("drawn", "real"):
            assert np.asarray(Image.open(out / picture[name]).convert("RGB")).tobytes() in shown
    rebuilt = data["pictures"]["heldout"][0]
    real, back = (np.asarray(Image.open(out / rebuilt[name]), float) for name in ("real", "reconstructed"))
    psnr = 10 * np.log10(255**2 / np.square(real - back).mean())
    assert psnr == pytest.approx(rebuilt["psnr_db"], abs=0.05)  # the file is rounded to whole values


def test_best_and_worst_follow_the_stated_rule(out: Path) -> None:
    data = report(out)
    ranks = {p["caption"]: (p["rank"]["in-domain CLIP"], p["number"]) for p in data["pictures"]["heldout"]}
    expected = sorted(ranks, key=lambda caption: ranks[caption])[:4]
    page = (out / "report.html").read_text("utf-8")
    section = page.split("Best results", 1)[1].split("Worst results", 1)[0]
    captions = [attributes["alt"] for tag, attributes in Parsed(section).tags if tag == "img"][::2]
    assert captions == [f"generated: {caption}" for caption in expected]


def test_captions_are_escaped_and_nothing_is_fetched(out: Path) -> None:
    page = (out / "report.html").read_text("utf-8")
    found = Parsed(page)
    assert EVIL in found.text and f"generated: {EVIL}" in {a.get("alt") for _, a in found.tags}
    tags = {tag for tag, _ in found.tags}
    assert not tags & {"script", "link", "iframe", "object", "base", "form"}
    for _, attributes in found.tags:
        assert not [name for name in attributes if name.startswith("on")]
        for name in ("src", "href"):
            assert (attributes.get(name) or "data:").startswith("data:")
    assert "url(" not in page and "@import" not in page
    (policy,) = [a["content"] for tag, a in found.tags if tag == "meta" and "http-equiv" in a]
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def test_every_untrusted_text_is_escaped(out: Path) -> None:
    """A hostile string in the JSON files never becomes a tag."""
    before = [tag for tag, _ in parsed(out).tags]

    def poison(tree: Any) -> Any:
        if isinstance(tree, dict):
            return {key: poison(value) for key, value in tree.items()}
        if isinstance(tree, list):
            return [poison(value) for value in tree]
        return EVIL + tree if isinstance(tree, str) else tree

    data, run = report(out), json.loads((out / "run.json").read_text())
    hostile = copy.deepcopy(data)
    for key in ("command", "made", "machine"):
        hostile[key] = poison(data[key])
    hostile["data"]["source"] = hostile["model"]["folder"] = EVIL
    for pictures in hostile["pictures"].values():
        for picture in pictures:
            picture["caption"] = EVIL
    (out / "evaluation.json").write_text(json.dumps(hostile))
    (out / "run.json").write_text(json.dumps({**run, "config": {EVIL: EVIL}}))
    write_report(out)
    after = [tag for tag, _ in parsed(out).tags]
    assert "script" not in after and after.count("img") == before.count("img")


def test_it_can_be_made_again_from_the_files_alone(out: Path) -> None:
    before = (out / "report.html").read_bytes()
    (out / "report.html").unlink()
    shutil.rmtree(out / "features")
    assert write_report(out).read_bytes() == before


def test_sections_without_data_are_left_out(out: Path) -> None:
    data = report(out)
    nll = json.loads((out / "nll.json").read_text())
    assert nll["model"] == data["model"]["sha256"] and "Negative log-likelihood by t" in parsed(out).text
    (out / "nll.json").write_text(json.dumps({**nll, "model": "another"}))
    (out / "run.json").unlink()
    del data["sweep"]
    data |= {"memorization": {}, "distribution": {}, "text_fit": {}, "command": None}
    data["text_use"]["gaps"] = {}
    data["pictures"] = {"heldout": data["pictures"]["heldout"][:1]}
    data["retrieval"] = {"heldout": data["retrieval"]["heldout"]}
    (out / "evaluation.json").write_text(json.dumps(data))
    text = Parsed(write_report(out).read_text("utf-8")).text
    for absent in ("log-likelihood by t", "Training loss", "sampling steps", "Realism", "CLIP score", "Best results"):
        assert absent not in text
    assert "Not measured: the data set has no held-out pictures" in text


# --- charts and numbers --------------------------------------------------------------------------


@pytest.mark.parametrize("log", [False, True])
def test_points_are_plotted_at_their_values(log: bool) -> None:
    """Read back from the SVG with the help of two of its own ticks, on linear and logarithmic axes."""
    points = [(10.0, 0.02), (20.0, 0.3), (70.0, 7.0), (100.0, 0.5)]
    svg = str(inline_svg(line_chart([Series("a", points)], x="x", y="y", log_x=log, log_y=log)))
    scale = np.log10 if log else np.asarray
    dots = np.array(re.findall(r'<use xlink:href="#\w+" x="([\d.]+)" y="([\d.]+)"', svg), dtype=float)
    assert len(dots) == 4
    texts = re.findall(r'text-anchor: (\w+)[^"]*" x="([\d.]+)" y="([\d.]+)"[^>]*>([\d.,]+)<', svg)
    for axis, anchor in ((0, "middle"), (1, "end")):
        ticks = [(float(text[1 + axis]), float(text[3].replace(",", ""))) for text in texts if text[0] == anchor]
        (p0, v0), (p1, v1) = [tick for tick in ticks if not log or tick[1] > 0][:2]
        values = scale([point[axis] for point in points])
        unit = (p1 - p0) / (scale(v1) - scale(v0))
        moved = dots[:, axis] - (p0 + unit * (values - scale(v0)))
        assert np.ptp(moved) < 0.1  # labels may be shifted against their ticks, all by the same distance
        assert abs(moved.mean()) < (0.1 if axis == 0 else 5)


def test_charts_follow_the_pages_colors_and_are_reproducible() -> None:
    series = [Series(f"line {i}", [(x, x * i + 1) for x in range(30)]) for i in range(4)]
    charts = [str(inline_svg(line_chart(series, x="step", y="loss", log_y=True))) for _ in range(2)]
    assert charts[0] == charts[1] and len(charts[0]) < 12_000
    for variable in ("--c0", "--c1", "--c2", "--c3", "--soft", "--line"):
        assert f"var({variable})" in charts[0]
    colors = set(re.findall(r"(?:stroke|fill): (#\w+)", charts[0]))
    assert not colors  # any other color would be the same in light and dark mode
    assert ET.fromstring(charts[0].replace("<svg ", '<svg xmlns:xlink="http://www.w3.org/1999/xlink" ', 1)).tag == "svg"
    assert line_chart([Series("a", [])], x="x", y="y") is None and inline_svg(None) == ""


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.01234, "0.0123"),
        (46.4001, "46.4"),
        (10.0, "10.0"),
        (1740.2, "1,740"),
        (-0.5, "−0.500"),
        (0.0, "0.00"),
        (3e-9, "3.00e-09"),
    ],
)
def test_numbers_are_readable(value: float, text: str) -> None:
    assert number(value) == text


def test_curves_of_another_run_are_removed(out: Path, home: Path) -> None:
    words = ["--quick", "--steps", "1", "--out", str(out), "--data", str(home / "data")]
    main(["evaluate", str(home / "run/pipeline"), *words])
    assert (out / "run.json").exists()
    shutil.copytree(home / "run/pipeline", out.parent / "model")
    main(["evaluate", str(out.parent / "model"), *words, "--net", str(home / "net")])
    assert not (out / "run.json").exists()
    assert "Training loss" not in parsed(out).text


def test_an_exported_model_has_its_runs_curves_and_no_path(out: Path, home: Path) -> None:
    exported = out.parent / "exported"
    main(["export", str(home / "run"), str(exported)])
    assert str(home) not in (exported / "run.json").read_text("utf-8")
    page = out.parent / "shared/report.html"
    words = ["--data", str(home / "data"), "--net", str(home / "net"), "--out", str(out), "--report", str(page)]
    main(["evaluate", str(exported), "--quick", "--steps", "1", *words])
    assert json.loads((out / "run.json").read_text())["curves"]["loss"]
    assert page.read_bytes() == (out / "report.html").read_bytes()
    assert "Training loss" in parsed(out).text


def test_an_interval_of_guidance_is_named_where_it_has_an_effect() -> None:
    assert sampling(8, 3.0, (0.2, 1.0)) == "8 steps, guidance scale 3 for t/T in [0.2, 1)"
    assert sampling(8, 3.0, (0.0, 1.0)) == "8 steps, guidance scale 3"
    assert sampling(8, 1.0, [0.2, 1.0]) == "8 steps, guidance scale 1"
