"""Curves as inline SVG, colored by the page's CSS: crisp at any size, light or dark, and a few kilobytes each."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

WIDTH, HEIGHT = 480, 250  # of the drawing, in its own units: the page scales it
LEFT, RIGHT, TOP, BOTTOM = 66, 10, 10, 40  # margins
TICKS = 5


@dataclass(frozen=True)
class Series:
    """One line.

    Attributes:
        name: as the legend says it.
        points: (x, y), in order of x.
        errors: half the height of each point's bar; none if empty.
    """

    name: str
    points: Sequence[tuple[float, float]]
    errors: Sequence[float] = ()


@dataclass(frozen=True)
class Axis:
    """One direction: where values lie, and which of them are written beside it."""

    ticks: tuple[float, ...]
    place: Callable[[float], float]

    @classmethod
    def over(cls, values: Sequence[float], start: float, end: float, *, log: bool, wide: bool = False) -> Axis:
        """An axis that shows these values between `start` and `end`, in units of the drawing.

        Args:
            log: whether it is logarithmic; then the values must be positive.
            wide: whether it ends at ticks; else where the values do.
        """
        low, high = min(values), max(values)
        ticks = log_ticks(low, high) if log else even_ticks(low, high)
        if wide:
            low, high = min(low, ticks[0]), max(high, ticks[-1])

        def scale(value: float) -> float:
            return math.log(value) if log else value

        span = scale(high) - scale(low) or 1.0
        inside = tuple(tick for tick in ticks if low <= tick <= high)
        return cls(inside, lambda value: start + (end - start) * (scale(value) - scale(low)) / span)


def even_ticks(low: float, high: float) -> list[float]:
    """Round numbers, about TICKS of them, from at most `low` to at least `high`."""
    span = high - low or abs(high) or 1.0
    rough = span / TICKS
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, max(last, first + 1) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten, with their doubles and fives where there are few, from at most `low` to at least `high`."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    factors = (1, 2, 5) if last - first <= 2 else (1,)
    ticks = [factor * 10.0**power for power in range(first, last + 1) for factor in factors]
    start = max((i for i, tick in enumerate(ticks) if tick <= low), default=0)
    end = min((i for i, tick in enumerate(ticks) if tick >= high), default=len(ticks) - 1)
    return ticks[start : max(end, start + 1) + 1]


def line_chart(
    series: Sequence[Series],
    *,
    x: str,
    y: str,
    log_x: bool = False,
    log_y: bool = False,
    names: Sequence[str] = (),
) -> Markup:
    """Lines over one pair of axes.

    Args:
        x, y: what the axes show.
        log_x, log_y: where an axis may be logarithmic; it is linear all the same if a value isn't positive.
        names: instead of numbers, what stands at x = 0, 1, 2, …
    Returns:
        A <figure>; empty where there is nothing to show.
    """
    shown = [line for line in series if line.points]
    if not shown:
        return Markup("")
    xs = [point[0] for line in shown for point in line.points]
    ys = [
        end
        for line in shown
        for (_, middle), error in zip(line.points, line.errors or [0.0] * len(line.points), strict=True)
        for end in (middle - error, middle + error)
    ]
    across = Axis.over(xs, LEFT, WIDTH - RIGHT, log=log_x and min(xs) > 0)
    if names:
        half = (WIDTH - LEFT - RIGHT) / len(names) / 2
        inner = Axis.over([0, max(1, len(names) - 1)], LEFT + half, WIDTH - RIGHT - half, log=False)
        across = Axis(tuple(range(len(names))), inner.place)
    up = Axis.over(ys, HEIGHT - BOTTOM, TOP, log=log_y and min(ys) > 0, wide=True)
    parts = [grid(across, up, names), *(drawn(line, i, across, up) for i, line in enumerate(shown))]
    middle = (HEIGHT - BOTTOM + TOP) / 2
    parts.append(Markup('<text class="axis" x="{}" y="{}">{}</text>').format(WIDTH / 2, HEIGHT - 6, x))
    turned = Markup('<text class="axis" transform="translate(12 {}) rotate(-90)">{}</text>')
    parts.append(turned.format(middle, y))
    told = ", ".join(line.name for line in shown)
    svg = Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
        WIDTH, HEIGHT, f"{y} over {x}: {told}", Markup("").join(parts)
    )
    legend = Markup("").join(
        Markup('<span><i class="c{}"></i>{}</span>').format(i, line.name) for i, line in enumerate(shown)
    )
    key = Markup('<div class="legend">{}</div>').format(legend) if len(shown) > 1 else Markup("")
    return Markup('<figure class="chart">{}{}</figure>').format(key, svg)


def grid(across: Axis, up: Axis, names: Sequence[str]) -> Markup:
    """The ticks and their lines."""
    line = Markup('<path class="grid" d="M{} {:.1f}H{}"/><text class="y" x="{}" y="{:.1f}">{}</text>')
    rows = [line.format(LEFT, up.place(t), WIDTH - RIGHT, LEFT - 6, up.place(t) + 4, short(t)) for t in up.ticks]
    told = [names[int(tick)] if names else short(tick) for tick in across.ticks]
    label = Markup('<text class="x" x="{:.1f}" y="{}">{}</text>')
    return Markup("").join(
        [*rows, *(label.format(across.place(t), HEIGHT - BOTTOM + 16, s) for t, s in zip(across.ticks, told))]
    )


def drawn(line: Series, number: int, across: Axis, up: Axis) -> Markup:
    """A line, with dots where its points are few, and their bars."""
    places = [(across.place(a), up.place(b)) for a, b in line.points]
    path = "M" + "L".join(f"{a:.1f} {b:.1f}" for a, b in places)
    bars = "".join(
        f"M{across.place(a):.1f} {up.place(b - error):.1f}V{up.place(b + error):.1f}"
        for (a, b), error in zip(line.points, line.errors)
    )
    dots = [Markup('<circle cx="{:.1f}" cy="{:.1f}" r="3.2"/>').format(a, b) for a, b in places]
    return Markup('<g class="line c{}"><path d="{}"/>{}{}</g>').format(
        number,
        path,
        Markup('<path class="bars" d="{}"/>').format(bars) if bars else "",
        Markup("").join(dots) if len(dots) <= 24 else "",
    )


def short(value: float) -> str:
    """A number as an axis says it: 0.05, 200, 15k."""
    if abs(value) >= 10_000:
        return f"{value / 1000:g}k"
    return f"{value:.4g}" if value == 0 or abs(value) >= 1e-4 else f"{value:.0e}"
