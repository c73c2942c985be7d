"""Charts: small SVG pictures for an HTML page. They need no script, and style sheets decide their colours.

A chart is 360 units wide, so that its letters can be read on a phone. The class of a series (such as `verified`) is a
class of its shapes. A colour that is data, such as that of an exit, is given as the CSS variable --c instead.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Self

from markupsafe import Markup

WIDTH, HEIGHT = 360, 250
LEFT, RIGHT, TOP, BOTTOM = 40, 20, 24, 38               # margins around the area of the points
LETTER, LINE = 6.4, 12                                  # width of a letter and height of a line of a label
_PLACES = ((8, 4, "start"), (-8, 4, "end"), (0, -9, "middle"), (0, 17, "middle"), (8, 15, "start"), (-8, 15, "end"),
           (8, -7, "start"), (-8, -7, "end"))           # of a label beside its point: dx, dy, text-anchor; best first

Box = tuple[float, float, float, float]                 # left, top, right, bottom


@dataclass(frozen=True)
class Axis:
    """A horizontal or vertical axis of a chart."""

    title: str
    low: float
    high: float
    ticks: dict[float, str]         # {value: text}
    log: bool = False

    @classmethod
    def round(cls, title: str, values: Iterable[float], text: Callable[[float], str], most: int = 6) -> Self:
        """Make an axis that covers the values, and whose ticks are round numbers.

        Args:
            text: formats the value of a tick.
            most: largest number of intervals between ticks.
        """
        values = list(values)
        low, high = min(values), max(values)
        rough = (high - low or abs(high) or 1.0) / most
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(n * power for n in (1, 2, 5, 10) if n * power >= rough * (1 - 1e-9))
        first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
        ticks = {round(n * step, 10): text(round(n * step, 10)) for n in range(first, max(last, first + 1) + 1)}
        return cls(title, min(ticks), max(ticks), ticks)

    @classmethod
    def doubling(cls, title: str, values: Iterable[float]) -> Self:
        """Make a logarithmic axis with a tick at each value."""
        values = list(values)
        return cls(title, min(values), max(values), {value: f"{value:,}" for value in values}, log=True)

    def share(self, value: float) -> float:
        """Return the place of a value on the axis: 0 at its low end, 1 at its high end."""
        scale = math.log if self.log else float
        low, high = scale(self.low), scale(self.high)
        return (scale(value) - low) / (high - low) if high > low else 0.5


@dataclass(frozen=True)
class Series:
    """Points of one kind. `points` has (x, y, label) for each point; a label may be "".

    css: classes of the shapes. `line` joins the points, `dots` draws them, `dashed` and `hollow` change them.
    colour: the CSS variable --c of the shapes, such as "#5BBFC8"; "" = the style sheet decides.
    """

    name: str
    css: str
    points: Sequence[tuple[float, float, str]]
    colour: str = ""
    line: bool = True
    dots: bool = True
    bounds: Sequence[tuple[float, float, float]] = ()       # (x, y, bound): draw a stroke from y to the bound


def chart(title: str, series: Sequence[Series], x: Axis, y: Axis) -> Markup:
    """Draw series of points over two axes. Returns an <svg> element.

    title: what a screen reader says instead of the picture.
    """
    def place(px: float, py: float) -> tuple[float, float]:
        return (LEFT + x.share(px) * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - y.share(py) * (HEIGHT - TOP - BOTTOM))

    shapes, words, taken = [], [], []
    for each in series:
        spots = [(*place(px, py), label) for px, py, label in each.points]
        bounds = [(*place(px, py), place(px, to)[1]) for px, py, to in each.bounds]
        shapes.append(_shapes(each, spots, bounds))
        words += spots if each.dots else []
        taken += [(a - 5, b, a + 5, to) for a, b, to in bounds] + (_along(spots) if each.line else [])
    return Markup(f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">'
                  f'{_axes(x, y, place)}{"".join(shapes)}{_labels(words, taken)}</svg>')


def legend(series: Sequence[Series]) -> Markup:
    """List the names of the series beside samples of their shapes. Returns a <ul> element."""
    items = (f'<li><svg viewBox="0 0 26 12" aria-hidden="true"><g class="{each.css}"{_style(each)}>'
             f'{_halo(each, "M1,6H25") if each.line else ""}'
             f'{"<circle cx=13 cy=6 r=4 />" if each.dots else ""}</g></svg>{escape(each.name)}</li>' for each in series)
    bound = ('<li><svg viewBox="0 0 26 12" aria-hidden="true"><path class="bound" d="M13,0V11M8,11h10"/></svg>'
             'certified bound</li>')
    return Markup(f'<ul class="legend">{"".join(items)}{bound if any(each.bounds for each in series) else ""}</ul>')


def _axes(x: Axis, y: Axis, place: Callable[[float, float], tuple[float, float]]) -> str:
    bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    parts = []
    for value, text in y.ticks.items():
        at = place(x.low, value)[1]
        parts.append(f'<path class="grid" d="M{LEFT},{at:.1f}H{right}"/>'
                     f'<text class="tick" x="{LEFT - 6}" y="{at + 3.5:.1f}" text-anchor="end">{escape(text)}</text>')
    for value, text in x.ticks.items():
        at = place(value, y.low)[0]
        parts.append(f'<path class="grid" d="M{at:.1f},{bottom}v4"/>'
                     f'<text class="tick" x="{at:.1f}" y="{bottom + 15}" text-anchor="middle">{escape(text)}</text>')
    return (f'{"".join(parts)}<path class="base" d="M{LEFT},{bottom}H{right}"/>'
            f'<text class="title" x="{right}" y="{HEIGHT - 6}" text-anchor="end">{escape(x.title)}</text>'
            f'<text class="title" x="2" y="10">{escape(y.title)}</text>')


def _style(series: Series) -> str:
    return f' style="--c:{series.colour}"' if series.colour else ""


def _halo(series: Series, path: str) -> str:
    """Draw a line. Under a line with a colour of its own, which may be pale, lies a wider one that has contrast."""
    return (f'<path class="halo" d="{path}"/>' if series.colour else "") + f'<path class="line" d="{path}"/>'


def _shapes(series: Series, spots: Sequence[tuple[float, float, str]],
            bounds: Sequence[tuple[float, float, float]]) -> str:
    parts = []
    if series.line and len(spots) > 1:
        parts.append(_halo(series, "M" + "L".join(f"{a:.1f},{b:.1f}" for a, b, _ in spots)))
    parts += [f'<path class="bound" d="M{a:.1f},{b:.1f}V{to:.1f}M{a - 5:.1f},{to:.1f}h10"/>' for a, b, to in bounds]
    if series.dots:
        for (a, b, _), (px, py, label) in zip(spots, series.points, strict=True):
            said = f"{series.name}{', ' + label if label else ''}: {px:,.4g}, {py:,.4g}"
            parts.append(f'<circle cx="{a:.1f}" cy="{b:.1f}" r="4"><title>{escape(said)}</title></circle>')
    return f'<g class="{series.css}"{_style(series)}>{"".join(parts)}</g>'


def _along(spots: Sequence[tuple[float, float, str]]) -> list[Box]:
    """Return small boxes along the lines between points, so that labels can keep away from the lines."""
    return [(a + (c - a) * n / 8 - 1, b + (d - b) * n / 8 - 1, a + (c - a) * n / 8 + 1, b + (d - b) * n / 8 + 1)
            for (a, b, _), (c, d, _) in zip(spots, spots[1:]) for n in range(1, 8)]


def _labels(spots: Sequence[tuple[float, float, str]], taken: Sequence[Box]) -> str:
    """Write the labels of points where they cover neither a point, nor each other, nor what is taken."""
    taken = [*taken, *((a - 4, b - 4, a + 4, b + 4) for a, b, _ in spots)]
    parts = []
    for a, b, label in (spot for spot in spots if spot[2]):
        options = [(_box(a + dx, b + dy, anchor, label), a + dx, b + dy, anchor) for dx, dy, anchor in _PLACES]
        box, at, base, anchor = min(options, key=lambda option: _faults(option[0], taken))
        taken.append(box)
        parts.append(f'<text class="label" x="{at:.1f}" y="{base:.1f}" text-anchor="{anchor}">{escape(label)}</text>')
    return "".join(parts)


def _box(x: float, y: float, anchor: str, label: str) -> Box:
    width = LETTER * len(label)
    left = x - {"start": 0, "middle": width / 2, "end": width}[anchor]
    return left, y - LINE + 3, left + width, y + 3


def _faults(box: Box, taken: Sequence[Box]) -> int:
    """Count what a label at this place would cover, and whether it would leave the picture."""
    left, top, right, bottom = box
    outside = left < LEFT or right > WIDTH - 2 or top < 12 or bottom > HEIGHT - BOTTOM
    return 10 * outside + sum(left < r and right > a and top < d and bottom > b for a, b, r, d in taken)
