"""Charts as inline SVG whose colours are CSS variables of the page, so that they follow its light and dark theme.

A chart is drawn at about its size on the page (420 units wide), so its text keeps its size. Its text alternative names
both axes and gives the values. Points that are not finite are left out. Whatever text a caller passes is escaped.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

LEFT, RIGHT, TOP, BOTTOM = 46, 10, 28, 34
MAX_COLUMNS = 200  # iterations drawn as scatter; more would only add bytes
MOST_TOLD = 24  # values of a curve in its text alternative
SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")

Point = tuple[float, float]
Row = tuple[float, float, float, float]


@dataclass(frozen=True)
class Axes:
    """A plot area: data ranges, size, and the SVG of its grid and labels."""

    x_range: tuple[float, float]
    y_range: tuple[float, float]
    x_label: str
    y_label: str
    width: int = 420
    height: int = 236

    def place(self, x: float, y: float) -> Point:
        """Position of a data point in SVG units."""
        (x0, x1), (y0, y1) = self.x_range, self.y_range
        inner_width, inner_height = self.width - LEFT - RIGHT, self.height - TOP - BOTTOM
        return LEFT + (x - x0) / (x1 - x0) * inner_width, TOP + (y1 - y) / (y1 - y0) * inner_height

    def draw(self, *marks: str, told: str = "") -> str:
        """The whole chart: grid, ticks and labels below, `marks` above; `told` gives its values in words."""
        values = ticks(*self.y_range)
        exponent = _exponent(values)
        parts = []
        for value in values:
            _, y = self.place(self.x_range[0], value)
            parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{self.width - RIGHT}"/>')
            shown = number(value / 10.0**exponent)
            parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{shown}</text>')
        for value in ticks(*self.x_range, most=6, whole=True):
            x, _ = self.place(value, self.y_range[0])
            parts.append(
                f'<text x="{x:.1f}" y="{self.height - BOTTOM + 15}" text-anchor="middle">{number(value)}</text>'
            )
        middle = (LEFT + self.width - RIGHT) / 2
        parts.append(f'<text x="{middle}" y="{self.height - 3}" text-anchor="middle">{escape(self.x_label)}</text>')
        times = f", \N{MULTIPLICATION SIGN}10{str(exponent).translate(SUPERSCRIPT)}" if exponent else ""
        parts.append(f'<text class="quantity" x="0" y="11">{escape(self.y_label + times)}</text>')
        label = f"{self.y_label} by {self.x_label}" + (f". {told}." if told else "")
        size = f'viewBox="0 0 {self.width} {self.height}"'
        return f'<svg {size} role="img" aria-label="{escape(label)}">{"".join(parts)}{"".join(marks)}</svg>'


def line_chart(points: Sequence[Point], label: str, *, css: str = "a", width: int = 320, height: int = 156) -> str:
    """One quantity by iteration; `label` is the quantity with its unit."""
    points = _finite(points)
    if not points:
        return ""
    axes = Axes(_iterations(points), _padded(y for _, y in points), "iteration", label, width=width, height=height)
    return axes.draw(_line(axes, points, css), told=in_words(points))


def reward_chart(
    mean: Sequence[Point], std: Sequence[float], held_out: Sequence[tuple[float, float, float, float]], label: str
) -> str:
    """Training reward by iteration with a band of one standard deviation, and held-out means with their intervals.

    Args:
        mean: (iteration, mean reward).
        std: the standard deviation at each of them.
        held_out: (iterations trained, mean, low, high).
        label: the reward, with its unit if it has one.
    """
    band = [(x, y - s, y + s) for (x, y), s in zip(mean, std, strict=True) if math.isfinite(y) and math.isfinite(s)]
    held_out = [row for row in held_out if all(map(math.isfinite, row))]
    points = _finite(mean)
    values = [y for _, y in points] + [y for _, low, high in band for y in (low, high)]
    values += [y for row in held_out for y in row[1:]]
    if not values:
        return ""
    axes = Axes(
        _iterations([*points, *((row[0], 0.0) for row in held_out)]), _padded(values), "iteration", label, height=276
    )
    marks, told = [_band(axes, band, "a"), _line(axes, points, "a")], []
    for x, middle, low, high in held_out:
        (px, py), (_, p_low), (_, p_high) = axes.place(x, middle), axes.place(x, low), axes.place(x, high)
        shown = f"after {x:g} iterations {middle:.3g} ({low:.3g} to {high:.3g})"
        told.append(shown)
        whisker = f"M{px:.1f} {p_low:.1f}V{p_high:.1f}M{px - 4:.1f} {p_low:.1f}h8M{px - 4:.1f} {p_high:.1f}h8"
        circle = f'<circle cx="{px:.1f}" cy="{py:.1f}" r="4.5"/>'
        marks.append(f'<g class="mark b"><path d="{whisker}"/>{circle}<title>held out, {shown}</title></g>')
    parts = {"In training": in_words(points), "held out": ", ".join(_spread_over(told))}
    return axes.draw(*marks, told="; ".join(f"{name}: {words}" for name, words in parts.items() if words))


def interval_chart(
    mean: Sequence[tuple[float, float, float]],
    each: Sequence[tuple[float, Sequence[tuple[float, float]]]],
    num_steps: int,
) -> str:
    """The trained steps by iteration: a band from mean start to mean end, and a dot for every start and end.

    Args:
        mean: (iteration, mean start, mean end).
        each: (iteration, the intervals of its prompts).
        num_steps: T, the top of the axis.
    """
    mean = [row for row in mean if all(map(math.isfinite, row))]
    if not mean:
        return ""
    label = f"denoising step, 0 is noise and {num_steps} the picture"
    axes = Axes(_iterations([(x, 0.0) for x, *_ in mean]), (0.0, float(num_steps)), "iteration", label, height=276)
    thinned = each[:: max(1, -(-len(each) // MAX_COLUMNS))]
    starts = [(x, start) for x, intervals in thinned for start, _ in intervals]
    ends = [(x, end) for x, intervals in thinned for _, end in intervals]
    lower, upper = [(x, low) for x, low, _ in mean], [(x, high) for x, _, high in mean]
    return axes.draw(
        _band(axes, mean, "a"),
        _dots(axes, starts, "c"),
        _dots(axes, ends, "b"),
        _line(axes, lower, "c"),
        _line(axes, upper, "b"),
        told=f"Mean start: {in_words(lower)}; mean end: {in_words(upper)}",
    )


def steps_chart(
    curves: Sequence[tuple[str, str, Sequence[Row]]],
    num_steps: int,
    label: str,
    *,
    shaded: tuple[float, float] | None = None,
    width: int = 420,
    height: int = 216,
) -> str:
    """Curves over the denoising steps 0..num_steps, each with its band; where training happens is shaded.

    Args:
        curves: (CSS class, name, rows of (step, value, low, high)) of each; low = high draws no band.
        label: the quantity with its unit.
        shaded: the trained steps, [start, end).
    """
    drawn = [(css, name, [row for row in rows if all(map(math.isfinite, row))]) for css, name, rows in curves]
    values = [value for *_, rows in drawn for row in rows for value in row[1:]]
    if not values:
        return ""
    axes = Axes((0.0, float(num_steps)), _padded(values), "denoising step", label, width=width, height=height)
    marks = [_shade(axes, *shaded)] if shaded and all(map(math.isfinite, shaded)) else []
    told = [f"Trained: steps {shaded[0]:.1f} to {shaded[1]:.1f}"] if marks and shaded else []
    for css, _, rows in drawn:
        if any(high > low for _, _, low, high in rows):
            marks.append(_band(axes, [(x, low, high) for x, _, low, high in rows], css))
    for css, name, rows in drawn:
        points = [(x, value) for x, value, *_ in rows]
        marks.append(_line(axes, points, css))
        told += [f"{name}: {in_words(points)}"] if points else []
    return axes.draw(*marks, told="; ".join(told))


def histogram(
    counts: Sequence[tuple[str, str, Sequence[int]]], label: str, *, width: int = 420, height: int = 216
) -> str:
    """Bars of how often each step 0, 1, ... came up; the series stand side by side.

    Args:
        counts: (CSS class, name, counts) of each series.
        label: what is counted.
    """
    length = max((len(values) for *_, values in counts), default=0)
    highest = max((value for *_, values in counts for value in values), default=0)
    if not highest:
        return ""
    axes = Axes((-0.5, length - 0.5), (0.0, 1.06 * highest), "denoising step", label, width=width, height=height)
    share = 0.8 / len(counts)
    marks, told = [], []
    for place, (css, name, values) in enumerate(counts):
        for step, value in enumerate(values):
            if value:
                (left, top), (right, bottom) = (
                    axes.place(step - 0.4 + (place + side) * share, level) for side, level in ((0, value), (1, 0))
                )
                size = f'width="{right - left:.1f}" height="{bottom - top:.1f}"'
                title = f"<title>{escape(name)} at step {step}: {value}</title>"
                marks.append(f'<rect class="fill {css}" x="{left:.1f}" y="{top:.1f}" {size}>{title}</rect>')
        told.append(f"{name}: " + ", ".join(f"{value} at {step}" for step, value in enumerate(values) if value))
    return axes.draw(*marks, told="; ".join(told))


def scatter(points: Mapping[str, Sequence[Point]], css: Mapping[str, str], *, side: int = 420) -> str:
    """Points in the unit square, those of each series in its CSS class; hovering names the series."""
    marks = []
    for name, of_series in points.items():
        dots = "".join(
            f'<circle cx="{8 + x * (side - 16):.1f}" cy="{8 + (1 - y) * (side - 16):.1f}" r="3"/>'
            for x, y in _finite(of_series)
        )
        marks.append(f'<g class="point {css[name]}"><title>{escape(name)}</title>{dots}</g>')
    told = escape(", ".join(f"{len(of_series)} of {name}" for name, of_series in points.items()))
    frame = f'viewBox="0 0 {side} {side}" role="img" aria-label="images by their features: {told}"'
    return f'<svg {frame}><rect class="grid" width="{side}" height="{side}"/>{"".join(marks)}</svg>'


def stacked_bar(parts: Sequence[tuple[str, float]], css_of: Callable[[int], str]) -> str:
    """One horizontal bar of the parts' shares; a part's name and share appear on hovering."""
    total = sum(seconds for _, seconds in parts)
    if total <= 0:
        return ""
    marks, left = [], 0.0
    for index, (name, seconds) in enumerate(parts):
        width = 1000 * seconds / total
        title = f"<title>{escape(name)}: {seconds:.1f} s, {seconds / total:.0%}</title>"
        marks.append(
            f'<rect class="fill {css_of(index)}" x="{left:.2f}" width="{width:.2f}" height="10">{title}</rect>'
        )
        left += width
    told = escape(", ".join(f"{name} {seconds:.1f} s, {seconds / total:.0%}" for name, seconds in parts))
    frame = f'viewBox="0 0 1000 10" preserveAspectRatio="none" role="img" aria-label="shares of time: {told}"'
    return f'<svg class="bar" {frame}>{"".join(marks)}</svg>'


def ticks(low: float, high: float, *, most: int = 5, whole: bool = False) -> list[float]:
    """At most `most` + 1 round numbers within [low, high]; with `whole`, integers only."""
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    if whole:
        step = max(1.0, float(math.ceil(step)))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [index * step for index in range(first, last + 1)]


def number(value: float) -> str:
    """A short spelling for axes and tables."""
    if not math.isfinite(value):
        return str(value)
    if value and (abs(value) < 1e-3 or abs(value) >= 1e5):
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:.4g}"


def in_words(points: Sequence[Point]) -> str:
    """The points of a curve for who does not see it, evenly spaced ones where they are many."""
    return ", ".join(f"{y:.3g} at {x:g}" for x, y in _spread_over(points))


def _spread_over(values: Sequence[Any]) -> list[Any]:
    """All of a few; of many about half of `MOST_TOLD`, evenly spaced, and the last."""
    if len(values) <= MOST_TOLD:
        return list(values)
    every = -(-2 * len(values) // MOST_TOLD)
    return [*values[:-1:every], values[-1]]


def _exponent(values: Sequence[float]) -> int:
    """The power of ten that the ticks of an axis have in common where they are tiny or huge, else 0."""
    largest = max(map(abs, values), default=0.0)
    exponent = math.floor(math.log10(largest)) if largest else 0
    return 0 if -3 <= exponent < 5 else exponent


def _finite(points: Iterable[Point]) -> list[Point]:
    return [(x, y) for x, y in points if math.isfinite(y)]


def _iterations(points: Sequence[Point]) -> tuple[float, float]:
    low, high = min(x for x, _ in points), max(x for x, _ in points)
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _padded(values: Iterable[float]) -> tuple[float, float]:
    values = list(values)
    low, high = min(values), max(values)
    room = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    return low if low == 0 <= high else low - room, high + room


def _path(axes: Axes, points: Iterable[Point]) -> str:
    return "L".join(f"{x:.1f} {y:.1f}" for x, y in (axes.place(*point) for point in points))


def _line(axes: Axes, points: Sequence[Point], css: str) -> str:
    if len(points) == 1:
        return _dots(axes, points, css + " big")
    return f'<path class="line {css}" d="M{_path(axes, points)}"/>' if points else ""


def _dots(axes: Axes, points: Iterable[Point], css: str) -> str:
    path = "".join(f"M{x:.1f} {y:.1f}h0" for x, y in (axes.place(*point) for point in points))
    return f'<path class="dots {css}" d="{path}"/>' if path else ""


def _shade(axes: Axes, start: float, end: float) -> str:
    (left, top), (right, bottom) = axes.place(start, axes.y_range[1]), axes.place(end, axes.y_range[0])
    size = f'width="{right - left:.1f}" height="{bottom - top:.1f}"'
    return f'<rect class="shade" x="{left:.1f}" y="{top:.1f}" {size}/>'


def _band(axes: Axes, rows: Sequence[tuple[float, float, float]], css: str) -> str:
    if len(rows) < 2:
        return ""
    upper, lower = [(x, high) for x, _, high in rows], [(x, low) for x, low, _ in reversed(rows)]
    return f'<path class="band {css}" d="M{_path(axes, [*upper, *lower])}Z"/>'
