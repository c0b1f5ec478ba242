"""The figures of an evaluation, as a person wants them at the end of a command."""

from __future__ import annotations

from typing import Any

from ldm.inference.defaults import EVERYWHERE


def summary(report: dict[str, Any]) -> str:
    """A few lines: what it reads, what it draws, what it copies."""
    use = report["text_use"]
    lines = [
        f"{use['on']} loss {use['losses']['true']['total']:.4f} (squared error of eps, {use['n']} pictures)",
        *(f"  with {name} captions {signed(gap['total'], 4)}" for name, gap in use["gaps"].items()),
    ]
    for name, told in report["retrieval"].items():
        psnr = report["reconstruction"][name]["psnr_db"]["value"]
        lines.append(f"retrieval, {name} captions (the VAE reconstructs these pictures at {psnr:.1f} dB)")
        for space, found in told["drawn"].items():
            ceiling = told["ceiling"][space]
            kinds = {"": found, **{f", {kind}": found[kind] for kind in ("compositions", "others") if kind in found}}
            lines += [f"  {space}{kind}: {shares(recall)}" for kind, recall in kinds.items()]
            lines.append(f"  {space}, reconstructions: {shares(ceiling)}")
    for space, told in report["distribution"].items():
        lines.append(f"against {told['reference_n']} training pictures in {space}, drawn | real held-out (the floor)")
        for name, figure in told["drawn"].items():
            lines.append(f"  {name:<9} {spread(figure)} | {spread(told['floor'][name])}")
    for name, spaces in report["text_fit"].items():
        for space, told in spaces.items():
            lines.append(f"text fit in {space}, {name}: drawn {spread(told['drawn'])} | real {spread(told['real'])}")
    for space, sets in report["memorization"].items():
        for name, told in sets.items():
            near = told["near_copies"]
            lines.append(
                f"memorization in {space}, {name} captions: {told['verdict']}; near-copies "
                f"{near['drawn']['value']:.1%}, among held-out pictures {near['heldout']['value']:.1%}"
            )
    if "sweep" in report:
        best = report["sweep"]["best"]
        low, high = best["guidance_interval"]
        lines.append(
            f"best of the sweep: {best['num_inference_steps']} steps, guidance {best['guidance_scale']:g}"
            + (f" in {low:g} <= t/T < {high:g}" if best["guidance_scale"] > 1 and (low, high) != EVERYWHERE else "")
        )
    if "timing" in report:
        timing = report["timing"]
        lines.append(
            f"first picture in a fresh process {timing['first_picture_cold_seconds']} s, "
            f"{timing['warm_pictures']} pictures warm {timing['warm_seconds']} s"
        )
    return "\n".join(lines)


def shares(found: dict[str, Any]) -> str:
    """Top-1 and top-5 with their intervals."""
    told = [f"top-{k} {f['value']:.1%} ({f['low']:.1%} to {f['high']:.1%})" for k in (1, 5) for f in [found[f"top{k}"]]]
    return ", ".join([*told, f"n {found['top1']['n']}"])


def spread(figure: dict[str, Any]) -> str:
    """A figure and its interval."""
    return f"{figure['value']:.4g} ({figure['low']:.4g} to {figure['high']:.4g})"


def signed(figure: dict[str, Any], digits: int) -> str:
    """A difference and its interval."""
    return f"{figure['value']:+.{digits}f} ({figure['low']:+.{digits}f} to {figure['high']:+.{digits}f})"
