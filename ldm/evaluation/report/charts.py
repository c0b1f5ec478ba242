"""The charts of the report and the model card, made with matplotlib.

In the report a chart is inline SVG whose colors are the page's CSS variables, so that it follows light and dark mode.
The same evaluation always gives the same bytes.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

QUARTERS = ("q1", "q2", "q3", "q4")
NOISE = {"q1": "least noise", "q2": "2nd quarter", "q3": "3rd quarter", "q4": "most noise"}
CAPTIONS = {"true": "true caption", "shuffled": "shuffled caption", "null": "no caption"}
COLORS = ("#0f766e", "#b45309", "#4f46e5", "#be185d")  # of the lines; --c0 to --c3 in report.css
TEXT, GRID = "#67635c", "#e5e1d9"  # --soft and --line
MAX_DOTS = 24  # a line with more points has no dots
STYLE: dict[str, Any] = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "ldm",  # else ids are random
    "font.sans-serif": ["DejaVu Sans"],  # comes with matplotlib; the page replaces it by its own font
    "font.size": 9,
    "text.color": TEXT,
    "axes.labelcolor": TEXT,
    "xtick.color": TEXT,
    "ytick.color": TEXT,
}


@dataclass(frozen=True)
class Series:
    """One line of a chart.

    Attributes:
        name: in the legend.
        points: (x, y), x ascending.
        errors: half the height of each point's error bar; none if empty.
        color: an index into COLORS; by default the line's place in the chart.
    """

    name: str
    points: Sequence[tuple[float, float]]
    errors: Sequence[float] = ()
    color: int | None = None


def line_chart(
    series: Sequence[Series],
    *,
    x: str,
    y: str,
    log_x: bool = False,
    log_y: bool = False,
    names: Sequence[str] = (),
) -> Any:
    """Lines over one pair of axes.

    Args:
        x, y: labels of the axes.
        log_x, log_y: logarithmic axes; an axis with a value that isn't positive is linear all the same.
        names: tick labels at x = 0, 1, 2, … instead of numbers.
    Returns:
        A matplotlib Figure; None if no series has a point.
    """
    import matplotlib
    from matplotlib.figure import Figure  # not pyplot, which keeps global state

    series = [line for line in series if line.points]
    if not series:
        return None
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5.2, 2.9), layout="constrained")
        axes = figure.subplots()
        for place, line in enumerate(series):
            xs, ys = zip(*line.points)
            dots = "o" if len(xs) <= MAX_DOTS else ""
            color = COLORS[(place if line.color is None else line.color) % len(COLORS)]
            axes.errorbar(
                xs, ys, line.errors or None, color=color, label=line.name, linewidth=1.5, elinewidth=1,
                marker=dots, markersize=4, clip_on=False,
            )  # fmt: skip
        axes.set(xlabel=x, ylabel=y)
        if names:
            axes.set_xticks(range(len(names)), names)
            axes.set_xlim(-0.5, len(names) - 0.5)
        else:
            scale_axis(axes, "x", log_x and all(point[0] > 0 for line in series for point in line.points))
        scale_axis(axes, "y", log_y and all(point[1] > 0 for line in series for point in line.points))
        axes.grid(axis="y", color=GRID, linewidth=0.8, clip_on=False)
        axes.set_axisbelow(True)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        if len(series) > 1:
            figure.legend(loc="outside upper left", ncols=4, frameon=False, handlelength=1.2, columnspacing=1.2)
    return figure


def scale_axis(axes: Any, name: str, log: bool) -> None:
    """Tick labels like 0.05 and 15,000, and if logarithmic ticks at 1, 2 and 5 times powers of ten."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axis = getattr(axes, f"{name}axis")
    if log:
        axes.set(**{f"{name}scale": "log"})
        low, high = axis.get_view_interval()
        axis.set_major_locator(LogLocator(subs=(1, 2, 5) if math.log10(high / low) < 2.5 else (1,), numticks=12))
        axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{round(value, 12):,g}".replace("-", "−")))


def inline_svg(figure: Any) -> Markup:
    """A figure as an <svg> element for the page, which defines its colors and font; empty for None."""
    import matplotlib

    if figure is None:
        return Markup("")
    packed = io.StringIO()
    with matplotlib.rc_context(STYLE):
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(packed, format="svg", transparent=True, metadata=nothing)
    svg = packed.getvalue()
    for number, color in enumerate(COLORS):
        svg = svg.replace(color, f"var(--c{number})")
    svg = svg.replace(TEXT, "var(--soft)").replace(GRID, "var(--line)")
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)  # ids that other charts of the page have, too
    svg = re.sub(r"<defs>\s*<style.*?</defs>\n?", "", svg, count=1, flags=re.DOTALL)  # would apply to the whole page
    (axes,) = figure.axes
    label = f"{axes.get_ylabel()} over {axes.get_xlabel()}: " + ", ".join(axes.get_legend_handles_labels()[1])
    (box,) = re.findall(r'viewBox="([\d. ]+)"', svg)
    body = Markup(svg[svg.index(">", svg.index("<svg")) + 1 :])  # matplotlib escapes its texts
    return Markup('<svg viewBox="{}" role="img" aria-label="{}">{}').format(box, label, body)


def save_png(figure: Any, path: Path) -> None:
    """Write a figure as a PNG file on white."""
    import matplotlib

    with matplotlib.rc_context(STYLE):
        figure.savefig(path, format="png", dpi=144, facecolor="white", metadata={"Software": None})


def loss_by_t(use: dict[str, Any]) -> Any:
    """The validation loss by quarter of t, with each kind of caption; `use` is evaluation.json's "text_use"."""
    lines = [
        Series(name, [(i, use["losses"][kind][quarter]) for i, quarter in enumerate(QUARTERS)])
        for kind, name in CAPTIONS.items()
        if use["losses"].get(kind)
    ]
    loss = "validation loss" if use["on"] == "heldout" else "training loss"
    return line_chart(lines, x="quarter of t", y=loss, log_y=True, names=list(NOISE.values()))


def report_charts(report: dict[str, Any], run: dict[str, Any] | None, nll: dict[str, Any] | None) -> dict[str, Markup]:
    """Every chart of the report by name; empty if there are no data for it.

    Args:
        report, run, nll: evaluation.json, run.json and nll.json.
    """
    curves = run["curves"] if run else {}

    def logged(names: dict[str, str], first_color: int = 0) -> list[Series]:
        lines = enumerate(names.items(), first_color)
        return [Series(name, curves[key], (), color) for color, (key, name) in lines if key in curves]

    use = report["text_use"]
    gaps = [
        Series(
            CAPTIONS[kind],
            [(i, gap[quarter]["value"]) for i, quarter in enumerate(QUARTERS)],
            [(gap[quarter]["high"] - gap[quarter]["low"]) / 2 for quarter in QUARTERS],
            color=list(CAPTIONS).index(kind),
        )
        for kind, gap in use["gaps"].items()
    ]
    by_quarter = {f"heldout/{quarter}": name for quarter, name in NOISE.items()}
    caption_gaps = {"heldout/text_gap": CAPTIONS["shuffled"], "heldout/null_gap": CAPTIONS["null"]}
    figures = {
        "loss": line_chart(logged({"loss": "training loss"}), x="step", y="training loss", log_y=True),
        "heldout": line_chart(logged(by_quarter), x="step", y="validation loss", log_y=True),
        "gap": line_chart(logged(caption_gaps, 1), x="step", y="increase of the loss"),
        "by_t": loss_by_t(use),
        "gap_by_t": line_chart(gaps, x="quarter of t", y="increase of the loss", names=list(NOISE.values())),
        "nll": nll_chart(nll) if nll else None,
        **sweep_charts(report.get("sweep")),
    }
    return {name: inline_svg(figure) for name, figure in figures.items()}


def nll_chart(nll: dict[str, Any]) -> Any:
    """What each range of steps adds to the bound, per step; t = 0 is the decoder and is left out."""
    points, errors = [], []
    for term in nll["terms"]:
        if term["first"] > 0:
            steps = term["last"] - term["first"] + 1
            value = term["nats_per_dim"] / steps
            error = term["standard_error"] / steps
            points.append(((term["first"] * term["last"]) ** 0.5, value))
            errors.append(min(error, 0.9 * value) if value > 0 else error)  # a bar to 0 has no end on a log axis
    line = Series("nats", points, errors)
    return line_chart([line], x="t", y="nats per dimension and step", log_x=True, log_y=True)


def sweep_charts(sweep: dict[str, Any] | None) -> dict[str, Any]:
    """Retrieval and KID over the guidance scale, at the chosen number of steps, one line per interval."""
    if sweep is None:
        return {"sweep_recall": None, "sweep_kid": None}
    rows = [row for row in sweep["rows"] if row["steps"] == sweep["best"]["num_inference_steps"]]
    recall: list[Series] = []
    kid: list[Series] = []
    for low, high in sorted({tuple(row["guidance_interval"]) for row in rows}, key=lambda each: each[0] - each[1]):
        line = [row for row in rows if row["guidance_scale"] <= 1 or row["guidance_interval"] == [low, high]]
        line.sort(key=lambda row: row["guidance_scale"])
        name = "guidance at all t" if (low, high) == (0, 1) else f"t/T in [{low:g}, {high:g})"
        for series, found in (
            (recall, [row["retrieval"][sweep["chosen_on"]]["top5"] for row in line]),
            (kid, [row["kid"] for row in line]),
        ):
            points = [(row["guidance_scale"], each["value"]) for row, each in zip(line, found, strict=True)]
            series.append(Series(name, points, [(each["high"] - each["low"]) / 2 for each in found]))
    return {
        "sweep_recall": line_chart(recall, x="guidance scale", y="top-5 recall"),
        "sweep_kid": line_chart(kid, x="guidance scale", y="KID"),
    }
