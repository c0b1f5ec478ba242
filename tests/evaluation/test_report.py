"""The page that `ldm evaluate` leaves: what it says is what the JSON holds, and it is nobody's but its own."""

from __future__ import annotations

import base64
import copy
import io
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import road
import tiny
from PIL import Image

from ldm.cli.main import main
from ldm.evaluation.report.charts import Series, even_ticks, line_chart, log_ticks
from ldm.evaluation.report.page import figure, write_report
from ldm.evaluation.run_record import averaged, carry_run, read_curves

EVIL = '"><script>alert(1)</script><img src=x onerror=alert(2)> {{ 7 * 7 }}'


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run, evaluated once with everything; one of its captions is hostile."""
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
    main(["evaluate", str(folder / "run"), "--quick", "--steps", "1", *net, *grid])
    main(["evaluate", str(folder / "run"), "--nll", "--strata", "3"])
    return folder


@pytest.fixture
def out(home: Path, tmp_path: Path) -> Path:
    return shutil.copytree(home / "run/evaluation", tmp_path / "out")


class Seen(HTMLParser):
    """What a browser would see: tags with their attributes, and text."""

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


def seen(out: Path) -> Seen:
    return Seen((out / "report.html").read_text("utf-8"))


def report(out: Path) -> dict[str, Any]:
    return json.loads((out / "evaluation.json").read_text("utf-8"))


def test_the_figures_are_those_of_the_json(out: Path) -> None:
    text, told = seen(out).text, report(out)
    for set_ in ("train", "heldout"):
        for space in ("pixels", "own"):
            for top in ("top1", "top5"):
                found = told["retrieval"][set_]["drawn"][space][top]
                assert f"{found['value']:.1%} {found['low']:.1%} to {found['high']:.1%}" in text
    for kind in ("drawn", "floor"):
        fid = told["distribution"]["own"][kind]["fid"]
        assert f"{figure(fid['value'])} {figure(fid['low'])} to {figure(fid['high'])}" in text
    assert "new compositions" in text and told["memorization"]["own"]["heldout"]["verdict"] in text
    for known in (told["model"]["sha256"], told["data"]["sha256"], told["spaces"][1]["sha256"], told["command"]):
        assert known in text
    assert told["command"].startswith("ldm evaluate ") and told["machine"]["processor"] in text
    assert "optim.lr 0.00125" in text
    best = told["sweep"]["best"]
    assert f"guidance {best['guidance_scale']:g}" in text
    assert "1 steps, guided in 0.2 to 0.8" in text


def test_its_pictures_are_the_files_to_the_pixel(out: Path) -> None:
    told = report(out)
    shown = []
    for tag, attributes in seen(out).tags:
        if tag == "img":
            kind, _, code = str(attributes["src"]).partition(";base64,")
            assert kind == "data:image/webp"
            shown.append(np.asarray(Image.open(io.BytesIO(base64.b64decode(code))).convert("RGB")).tobytes())
    for picture in told["pictures"]["heldout"]:
        for name in ("drawn", "real"):
            assert np.asarray(Image.open(out / picture[name]).convert("RGB")).tobytes() in shown
    rebuilt = told["pictures"]["heldout"][0]
    real, back = (np.asarray(Image.open(out / rebuilt[name]), float) for name in ("real", "reconstructed"))
    psnr = 10 * np.log10(255**2 / np.square(real - back).mean())
    assert psnr == pytest.approx(rebuilt["psnr_db"], abs=0.05)  # the file is rounded to whole values


def test_best_and_worst_follow_the_stated_rule(out: Path) -> None:
    told = report(out)
    ranks = {p["caption"]: (p["rank"]["own"], p["number"]) for p in told["pictures"]["heldout"]}
    expected = sorted(ranks, key=lambda caption: ranks[caption])[:4]
    page = (out / "report.html").read_text("utf-8")
    section = page.split("The best it did", 1)[1].split("The worst", 1)[0]
    captions = [attributes["alt"] for tag, attributes in Seen(section).tags if tag == "img"][::2]
    assert captions == [f"drawn: {caption}" for caption in expected]


def test_captions_are_text_and_nothing_is_fetched(out: Path) -> None:
    page = (out / "report.html").read_text("utf-8")
    found = Seen(page)
    assert EVIL in found.text and f"drawn: {EVIL}" in {a.get("alt") for _, a in found.tags}
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
    """Whatever string of the JSON files is hostile, no tag comes of it."""
    before = [tag for tag, _ in seen(out).tags]

    def poison(tree: Any) -> Any:
        if isinstance(tree, dict):
            return {key: poison(value) for key, value in tree.items()}
        if isinstance(tree, list):
            return [poison(value) for value in tree]
        return EVIL + tree if isinstance(tree, str) else tree

    told, run = report(out), json.loads((out / "run.json").read_text())
    hostile = copy.deepcopy(told)
    for key in ("command", "made", "machine"):
        hostile[key] = poison(told[key])
    hostile["data"]["source"] = hostile["model"]["folder"] = EVIL
    for pictures in hostile["pictures"].values():
        for picture in pictures:
            picture["caption"] = EVIL
    (out / "evaluation.json").write_text(json.dumps(hostile))
    (out / "run.json").write_text(json.dumps({**run, "config": {EVIL: EVIL}}))
    write_report(out)
    after = [tag for tag, _ in seen(out).tags]
    assert "script" not in after and after.count("img") == before.count("img")


def test_it_can_be_made_again_from_the_files_alone(out: Path) -> None:
    before = (out / "report.html").read_bytes()
    (out / "report.html").unlink()
    shutil.rmtree(out / "features")
    assert write_report(out).read_bytes() == before


def test_what_was_not_measured_is_not_told(out: Path) -> None:
    told = report(out)
    nll = json.loads((out / "nll.json").read_text())
    assert nll["model"] == told["model"]["sha256"] and "Likelihood by t" in seen(out).text
    (out / "nll.json").write_text(json.dumps({**nll, "model": "another"}))
    (out / "run.json").unlink()
    del told["sweep"]
    told |= {"memorization": {}, "distribution": {}, "text_fit": {}, "command": None}
    told["text_use"]["gaps"] = {}
    told["pictures"] = {"heldout": told["pictures"]["heldout"][:1]}
    told["retrieval"] = {"heldout": told["retrieval"]["heldout"]}
    (out / "evaluation.json").write_text(json.dumps(told))
    text = Seen(write_report(out).read_text("utf-8")).text
    for absent in ("Likelihood by t", "How it learned", "how many steps?", "look real", "The best it did"):
        assert absent not in text
    assert "there is no verdict" in text


# --- curves --------------------------------------------------------------------------------------


def test_curves_are_the_log_and_what_was_told_last_counts(tmp_path: Path) -> None:
    rows = [
        {"step": 1, "loss": 3.0},
        {"step": 2, "loss": float("nan")},
        {"step": 3, "loss": 9.0},
        {"step": 3, "loss": 2.0},
    ]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"st')
    assert read_curves(tmp_path / "log.jsonl") == {"loss": [(1, 3.0), (3, 2.0)]}
    assert read_curves(tmp_path / "none.jsonl") == {}
    many = [(step, float(step)) for step in range(1000)]
    short = averaged(many, 7)
    assert len(short) == 7 and all(step == value for step, value in short)
    assert short[0][0] == pytest.approx(np.mean(range(142)))


def test_points_lie_where_their_values_are() -> None:
    """Read back from the SVG by two of its own ticks, linear and logarithmic."""
    points = [(10.0, 0.02), (20.0, 0.3), (70.0, 7.0), (100.0, 0.5)]
    for log in (False, True):
        svg = str(line_chart([Series("a", points)], x="x", y="y", log_x=log, log_y=log))
        scale = np.log if log else np.asarray
        dots = np.array([[float(v) for v in pair] for pair in re.findall(r'cx="([\d.]+)" cy="([\d.]+)"', svg)])
        ups = [(float(y), float(v)) for y, v in re.findall(r'class="y" x="\d+" y="([\d.]+)">([\d.e-]+)<', svg)]
        overs = [(float(x), float(v)) for x, v in re.findall(r'class="x" x="([\d.]+)" y="\d+">([\d.e-]+)<', svg)]
        for axis, ticks, shift in ((0, overs, 0), (1, ups, 4)):
            (p0, v0), (p1, v1) = ticks[0], ticks[-1]
            place = p0 - shift + (p1 - p0) * (scale([p[axis] for p in points]) - scale(v0)) / (scale(v1) - scale(v0))
            assert np.abs(dots[:, axis] - place).max() < 0.25


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (-0.3, 0.2), (5.0, 5.0), (0.0, 0.0), (1e-6, 3e-6), (3, 4000)])
def test_ticks_hold_what_is_shown(low: float, high: float) -> None:
    ticks = even_ticks(low, high)
    assert ticks[0] <= low and ticks[-1] >= high and 2 <= len(ticks) <= 9
    if low > 0:
        ticks = log_ticks(low, high)
        assert ticks[0] <= low * 1.0001 and ticks[-1] >= high * 0.9999 and 2 <= len(ticks) <= 12


@pytest.mark.parametrize(
    ("value", "told"),
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
def test_numbers_are_written_to_be_read(value: float, told: str) -> None:
    assert figure(value) == told


def test_other_models_leave_no_curves(out: Path, home: Path) -> None:
    """A folder that was another run's forgets its log."""
    main(
        [
            "evaluate",
            str(home / "run/pipeline"),
            "--quick",
            "--steps",
            "1",
            "--out",
            str(out),
            "--data",
            str(home / "data"),
        ]
    )
    assert (out / "run.json").exists()
    shutil.copytree(home / "run/pipeline", out.parent / "model")
    words = ["--data", str(home / "data"), "--net", str(home / "net"), "--out", str(out)]
    main(["evaluate", str(out.parent / "model"), "--quick", "--steps", "1", *words])
    assert not (out / "run.json").exists()
    assert "Training loss" not in seen(out).text


def test_an_exported_model_takes_its_runs_curves_along_and_no_path(out: Path, home: Path) -> None:
    exported = out.parent / "exported"
    main(["export", str(home / "run"), str(exported)])
    assert str(home) not in (exported / "run.json").read_text("utf-8")
    page = out.parent / "shared/report.html"
    words = ["--data", str(home / "data"), "--net", str(home / "net"), "--out", str(out), "--report", str(page)]
    main(["evaluate", str(exported), "--quick", "--steps", "1", *words])
    assert json.loads((out / "run.json").read_text())["curves"]["loss"]
    assert page.read_bytes() == (out / "report.html").read_bytes()
    assert "Training loss" in seen(out).text


@pytest.mark.parametrize(
    "said",
    ["", "[]", "{}", '{"step": 1, "config": 3, "curves": {}}', '{"step": "1", "config": null, "curves": {}}',
     '{"step": 1, "config": null, "curves": []}' + "x", '{"step": 1, "config": null, "curves": {"loss": [[1]]}}',
     '{"step": 1, "config": null, "curves": {"loss": [["a", "b"]]}}', '{"step": 1, "config": null, "curves": 7}'],
)  # fmt: skip
def test_a_strangers_record_of_a_run_is_refused_in_words(tmp_path: Path, said: str) -> None:
    (tmp_path / "run.json").write_text(said)
    with pytest.raises(ValueError, match=r"run\.json: expected the step, config and curves"):
        carry_run(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
