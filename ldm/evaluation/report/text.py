"""Numbers as people read them, the summary of an evaluation in the terminal, and the table of a sweep."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

from ldm.inference.defaults import EVERYWHERE

SPLITS = {"train": "training captions", "heldout": "held-out captions"}


def percent(value: float, digits: int = 1) -> str:
    """0.25 => 25.0%."""
    return f"{value:.{digits}%}"


def number(value: float, digits: int = 3) -> str:
    """A number with this many significant digits, without an exponent if readable: 0.0123, 46.4, 1,740."""
    least = digits - 1 - math.floor(math.log10(abs(value))) if value else digits - 1
    return f"{value:,.{max(0, least)}f}".replace("-", "−") if least < 8 else f"{value:.{digits - 1}e}"


def signed(value: float, digits: int = 4) -> str:
    """A difference, with its sign."""
    return f"{value:+.{digits}f}".replace("-", "−")


def sampling(steps: int, guidance_scale: float, guidance_interval: Sequence[float] = EVERYWHERE) -> str:
    """Settings of the generated pictures: 8 steps, guidance scale 3 for t/T in [0.2, 1)."""
    low, high = guidance_interval
    where = f" for t/T in [{low:g}, {high:g})" if guidance_scale > 1 and (low, high) != EVERYWHERE else ""
    return f"{steps} steps, guidance scale {guidance_scale:g}{where}"


def with_interval(estimate: dict[str, Any], write: Any = number) -> str:
    """An estimate and its interval: 46.4 (40.1 to 52.7)."""
    return f"{write(estimate['value'])} ({write(estimate['low'])} to {write(estimate['high'])})"


def recall_text(recall: dict[str, Any]) -> str:
    """Top-1 and top-5 recall with their intervals."""
    tops = [f"top-{k} {with_interval(recall[f'top{k}'], percent)}" for k in (1, 5)]
    text = ", ".join([*tops, f"n {recall['top1']['n']}"])
    if one := recall.get("relatives"):
        text += f"; top-1 among pictures of the same concept {with_interval(one['top1'], percent)}"
        text += f", n {one['top1']['n']}, chance {percent(one['chance'])}"
    return text


def seed_results(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The results over several seeds, by feature extractor."""
    return {space["name"]: report["seeds"][space["name"]] for space in report["spaces"] if "seeds" in report}


def kinds_of(recall: dict[str, Any]) -> list[str]:
    """The kinds of prompts that a recall has parts for."""
    return [name for name, found in recall.items() if isinstance(found, dict) and "candidates" in found]


def summary(report: dict[str, Any]) -> str:
    """The main results of evaluation.json in a few lines."""
    use = report["text_use"]
    split = "validation" if use["on"] == "heldout" else "training"
    lines = [
        f"{split} loss {use['losses']['true']['total']:.4f} (squared error of eps, {use['n']} pictures)",
        *(
            f"  increase with {name} captions {with_interval(gap['total'], signed)}"
            for name, gap in use["gaps"].items()
        ),
    ]
    for name, found in report["retrieval"].items():
        psnr = report["reconstruction"][name]["psnr_db"]["value"]
        lines.append(f"retrieval, {SPLITS[name]} (VAE reconstructions of the real pictures: PSNR {psnr:.1f} dB)")
        for extractor, recall in found["drawn"].items():
            parts = {"": recall, **{f", {kind}": recall[kind] for kind in kinds_of(recall)}}
            lines += [f"  {extractor}{part}: {recall_text(each)}" for part, each in parts.items()]
            lines.append(f"  {extractor}, upper bound (reconstructions): {recall_text(found['ceiling'][extractor])}")
    for extractor, metrics in report["distribution"].items():
        lines.append(
            f"{extractor} features, against {metrics['reference_n']} training pictures: "
            "generated | baseline (real pictures)"
        )
        for name, estimate in metrics["drawn"].items():
            lines.append(f"  {name:<9} {with_interval(estimate)} | {with_interval(metrics['floor'][name])}")
    for name, extractors in report["text_fit"].items():
        for extractor, scores in extractors.items():
            generated, real = with_interval(scores["drawn"]), with_interval(scores["real"])
            lines.append(f"CLIP score, {extractor}, {SPLITS[name]}: generated {generated} | real {real}")
    for extractor, sets in report["memorization"].items():
        for name, found in sets.items():
            near = found["near_copies"]
            lines.append(
                f"memorization, {extractor}, {SPLITS[name]}: {found['verdict']}; near-copies "
                f"{percent(near['drawn']['value'])}, of held-out pictures {percent(near['heldout']['value'])}"
            )
    for extractor, found in seed_results(report).items():
        lines.append(
            f"{found['seeds']} seeds of {found['prompts']} prompts, {extractor}: {recall_text(found['recall'])}"
        )
        lines.append(f"  every seed a top-1 hit: {with_interval(found['reliability'], percent)} of the prompts")
        if "coverage" in found:
            coverage = found["coverage"]
            lines.append(
                f"  coverage of a caption's pictures: {with_interval(coverage, percent)}; if chosen evenly "
                f"{percent(coverage['of_even_choice'])}, n {coverage['n']}"
            )
    if "sweep" in report:
        best = report["sweep"]["best"]
        settings = (best[key] for key in ("num_inference_steps", "guidance_scale", "guidance_interval"))
        lines.append(f"best setting of the sweep: {sampling(*settings)}")
    if "timing" in report:
        timing = report["timing"]
        lines.append(
            f"first picture of a fresh process {timing['first_picture_cold_seconds']} s, "
            f"{timing['warm_pictures']} pictures in a warm process {timing['warm_seconds']} s"
        )
    return "\n".join(lines)


def by_guidance(rows: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The rows by steps and interval, in words; within each group the guidance scale increases.

    Unguided rows belong to every interval.
    """
    intervals = sorted({tuple(row["guidance_interval"]) for row in rows})
    found = {}
    for count, interval in itertools.product(sorted({row["steps"] for row in rows}), intervals):
        alike = [
            row
            for row in rows
            if row["steps"] == count and (row["guidance_scale"] <= 1 or tuple(row["guidance_interval"]) == interval)
        ]
        suffix = f", guidance for t/T in [{interval[0]:g}, {interval[1]:g})" if interval != EVERYWHERE else ""
        found[f"{count} steps{suffix}"] = sorted(alike, key=lambda row: row["guidance_scale"])
    return found


def sweep_table(rows: Sequence[dict[str, Any]], sets: Sequence[str]) -> str:
    """The grid as text, one setting a line."""
    heads = [
        "steps",
        "guidance",
        "interval",
        "evaluations",
        *(f"{name} top-{k}" for name in sets for k in (1, 5)),
        "KID x 1000",
    ]
    text = ["  ".join(f"{head:>13}" for head in heads)]
    for row in rows:
        shares = [f"{row['retrieval'][name][f'top{k}']['value']:.1%}" for name in sets for k in (1, 5)]
        kid = f"{1000 * row['kid']['value']:.2f}±{1000 * row['kid']['standard_error']:.2f}"
        interval = "{:g} to {:g}".format(*row["guidance_interval"])
        cells = [str(row["steps"]), f"{row['guidance_scale']:g}", interval, str(row["evaluations"]), *shares, kid]
        text.append("  ".join(f"{cell:>13}" for cell in cells))
    return "\n".join(text)
