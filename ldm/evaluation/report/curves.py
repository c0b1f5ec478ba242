"""Which curves an evaluation has: how it was trained, and what depends on t."""

from __future__ import annotations

from typing import Any

from markupsafe import Markup

from ldm.evaluation.report.charts import Series, line_chart

QUARTERS = ("q1", "q2", "q3", "q4")
LEGEND = {"q1": "least noise", "q2": "2nd quarter", "q3": "3rd quarter", "q4": "most noise"}
CAPTIONS = {"true": "its own caption", "shuffled": "another's caption", "null": "no caption"}


def charts(report: dict[str, Any], run: dict[str, Any] | None, nll: dict[str, Any] | None) -> dict[str, Markup]:
    """Every chart by name; empty where there is nothing to show."""
    curves = run["curves"] if run else {}

    def lines(**names: str) -> list[Series]:
        return [Series(told, curves[name]) for name, told in names.items() if name in curves]

    use = report["text_use"]
    by_t = [
        Series(told, [(i, use["losses"][kind][quarter]) for i, quarter in enumerate(QUARTERS)])
        for kind, told in CAPTIONS.items()
        if use["losses"].get(kind)
    ]
    gaps = [
        Series(
            CAPTIONS[kind],
            [(i, gap[quarter]["value"]) for i, quarter in enumerate(QUARTERS)],
            [(gap[quarter]["high"] - gap[quarter]["low"]) / 2 for quarter in QUARTERS],
        )
        for kind, gap in use["gaps"].items()
    ]
    heldout = {f"heldout/{name}": told for name, told in LEGEND.items()}
    words = {"heldout/text_gap": "another's caption", "heldout/null_gap": "no caption"}
    return {
        "loss": line_chart(lines(loss="training loss"), x="step", y="training loss", log_y=True),
        "heldout": line_chart(lines(**heldout), x="step", y="held-out loss", log_y=True),
        "gap": line_chart(lines(**words), x="step", y="what a caption is worth"),
        "by_t": line_chart(by_t, x="quarter of t", y="held-out loss", log_y=True, names=list(LEGEND.values())),
        "gap_by_t": line_chart(gaps, x="quarter of t", y="more loss than with its own", names=list(LEGEND.values())),
        "nll": nll_chart(nll) if nll else Markup(""),
    }


def nll_chart(nll: dict[str, Any]) -> Markup:
    """What each stretch of steps adds to the bound, per step of it; t = 0 is the decoder's and stands apart."""
    points, errors = [], []
    for term in nll["terms"]:
        if term["first"] > 0:
            steps = term["last"] - term["first"] + 1
            points.append(((term["first"] * term["last"]) ** 0.5, term["nats_per_dim"] / steps))
            errors.append(term["standard_error"] / steps)
    safe = [min(error, 0.9 * value) if value > 0 else error for (_, value), error in zip(points, errors)]
    return line_chart([Series("nats", points, safe)], x="t", y="nats per dimension and step", log_x=True, log_y=True)
