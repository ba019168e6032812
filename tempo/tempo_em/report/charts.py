"""Charts as SVG elements: pure functions of numbers and names. Colours are classes, so that the page's themes reach them.

Everything is built as a tree and written by its serialiser: text from models and files cannot become markup.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from xml.etree.ElementTree import Element, SubElement, tostring

from markupsafe import Markup

from tempo_em.report.series import Curve

WIDTH, HEIGHT = 340, 200
LEFT, RIGHT, TOP, BOTTOM = 40, 98, 10, 30
LINE = 13.0  # of text
STYLES = 8
MOST_DOTS, MOST_LABELS = 24, 9
LONGEST_LABEL = 16


@dataclass(frozen=True)
class Axis:
    """The vertical axis: shares are written in percent. `low`, `high`: shown at least. `bound`: a dashed line with its name."""

    is_share: bool = False
    is_log: bool = False
    low: float | None = None
    high: float | None = None
    bound: tuple[float, str] | None = None

    def text(self, value: float) -> str:
        return f"{100 * value:.3g}%" if self.is_share else plain_number(value)

    def tick(self, value: float, step: float) -> str:
        """With as many digits as the steps between ticks need."""
        if self.is_log:
            return f"1e{value:g}"
        value, step, unit = (100 * value, 100 * step, "%") if self.is_share else (value, step, "")
        if step >= 1000 and value:
            return f"{value / 1000:,.{_digits(step / 1000)}f}k{unit}"
        return f"{value:,.{_digits(step)}f}{unit}"


def plain_number(value: float) -> str:
    """Three digits that count: 0.0123, 4.57, 12,345; powers of ten for the very small."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _digits(step: float) -> int:
    """Decimals that tell multiples of a step (1, 2 or 5 times a power of ten) apart."""
    return max(0, -math.floor(math.log10(step) + 1e-9))


@dataclass(frozen=True)
class Scale:
    """Values to pixels; `ticks` lie within."""

    low: float
    high: float
    start: float
    end: float
    ticks: list[float] = field(default_factory=list)

    def __call__(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return round(self.start + share * (self.end - self.start), 1)


def line_chart(
    key: str, title: str, curves: Sequence[Curve], axis: Axis, *, shaded: Sequence[tuple[float, float]] = ()
) -> Markup | None:
    """Lines with a name at their ends, and bands behind them; `shaded`: stretches of iterations. None without a point.

    `key`: what ids begin with, unique on the page.
    """
    keep: Callable[[float], bool] = (lambda v: v > 0) if axis.is_log else (lambda v: True)
    to_axis: Callable[[float], float] = math.log10 if axis.is_log else (lambda v: v)
    drawn = [
        Curve(
            c.name,
            [(x, y) for x, y in c.points if keep(y)],
            [(x, a, b) for x, a, b in c.band if keep(a)],
            c.style,
            c.short,
        )
        for c in curves
    ]
    drawn = [curve for curve in drawn if curve.points]
    if not drawn:
        return None
    xs = [x for curve in drawn for x, _ in curve.points]
    first, last = min(xs), max(max(xs), min(xs) + 1)
    x = Scale(first, last, LEFT, WIDTH - RIGHT, [t for t in ticks(first, last, 4) if t == int(t)])
    y = _vertical(drawn, axis)
    svg = _svg(key, title, _spoken(drawn, axis), WIDTH, HEIGHT)
    for start, end in shaded:
        a, b = x(max(start - 1, x.low)), x(min(end, x.high))
        SubElement(
            svg, "rect", _attributes(x=a, y=TOP, width=max(b - a, 1.5), height=HEIGHT - TOP - BOTTOM, class_="alarm")
        )
    _frame(svg, x, y, axis, "EM iteration")
    if axis.bound and keep(axis.bound[0]) and y.low <= to_axis(axis.bound[0]) <= y.high:
        at = y(to_axis(axis.bound[0]))
        SubElement(svg, "line", _attributes(x1=LEFT, x2=WIDTH - RIGHT, y1=at, y2=at, class_="bound"))
        _text(svg, axis.bound[1], LEFT + 4, at - 4, "note")
    for curve in reversed(drawn):  # the first lies on top
        _curve(svg, curve, x, y, axis, to_axis)
    _end_labels(svg, [(curve, y(to_axis(curve.points[-1][1]))) for curve in drawn])
    return _written(svg)


def _vertical(curves: Sequence[Curve], axis: Axis) -> Scale:
    values = [v for c in curves for _, v in c.points] + [v for c in curves for _, a, b in c.band for v in (a, b)]
    if axis.is_log:
        low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
        low, high = (low, high) if low < high else (low - 1, high + 1)
        step = -(-(high - low) // 5)
        return Scale(low, high, HEIGHT - BOTTOM, TOP, [float(t) for t in range(low, high + 1, step)])
    low = min(values) if axis.low is None else min(*values, axis.low)
    high = max(values) if axis.high is None else max(*values, axis.high)
    low, high = _widened(low, high)
    marks = ticks(low, high, 4)
    step = marks[1] - marks[0] if len(marks) > 1 else high - low
    low, high = math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step
    return Scale(low, high, HEIGHT - BOTTOM, TOP, ticks(low, high, 5))


def _curve(svg: Element, curve: Curve, x: Scale, y: Scale, axis: Axis, to_axis: Callable[[float], float]) -> None:
    group = SubElement(svg, "g", _attributes(class_=f"s{curve.style % STYLES}"))
    if curve.band:
        upper = [(x(at), y(to_axis(high))) for at, _, high in curve.band]
        lower = [(x(at), y(to_axis(low))) for at, low, _ in reversed(curve.band)]
        SubElement(group, "polygon", _attributes(points=_pairs([*upper, *lower]), class_="band"))
    pixels = [(x(at), y(to_axis(value))) for at, value in curve.points]
    SubElement(group, "polyline", _attributes(points=_pairs(pixels), class_="line"))
    for (at, value), (cx, cy) in zip(curve.points, pixels, strict=True) if len(pixels) <= MOST_DOTS else ():
        dot = SubElement(group, "circle", _attributes(cx=cx, cy=cy, r=2.4, class_="dot"))
        SubElement(dot, "title").text = f"{curve.name}, iteration {at:g}: {axis.text(value)}"


def _end_labels(svg: Element, ends: Sequence[tuple[Curve, float]]) -> None:
    """Names beside the ends of their lines, moved apart where they would overlap."""
    if len(ends) > MOST_LABELS:
        return
    by_height = sorted(ends, key=lambda end: end[1])
    at = spread([height for _, height in by_height], LINE, TOP + 4, HEIGHT - BOTTOM)
    for (curve, _), y in zip(by_height, at, strict=True):
        _text(svg, _short(curve.label), WIDTH - RIGHT + 7, y + 4, f"end s{curve.style % STYLES}")


def spread(heights: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Ascending heights, moved apart to `gap` and, where there is room, held within low and high."""
    placed: list[float] = []
    for height in heights:
        placed.append(max(height, low, placed[-1] + gap if placed else low))
    limit = high
    for i in reversed(range(len(placed))):
        placed[i] = max(min(placed[i], limit), low)
        limit = placed[i] - gap
    return [round(height, 1) for height in placed]


def reliability_chart(
    key: str, title: str, curves: Sequence[tuple[str, Sequence[tuple[float, float, float]], str]]
) -> Markup:
    """(name, (responses, promised, right) of each bin, class of its colour) against the diagonal, on which promises are kept."""
    side, left, top = 220, 40, 10
    svg = _svg(key, title, "; ".join(_kept(name, bins) for name, bins, _ in curves), side + left + 84, side + top + 34)
    x, y = Scale(0, 1, left, left + side, [0, 0.5, 1]), Scale(0, 1, top + side, top, [0, 0.5, 1])
    for tick in x.ticks:
        SubElement(svg, "line", _attributes(x1=left, x2=left + side, y1=y(tick), y2=y(tick), class_="grid"))
        _text(svg, f"{100 * tick:g}%", left - 6, y(tick) + 4, "tick left")
        _text(svg, f"{100 * tick:g}%", x(tick), top + side + 14, "tick middle")
    _text(svg, "promised by the critic", left + side / 2, top + side + 29, "tick middle")
    SubElement(svg, "line", _attributes(x1=x(0), x2=x(1), y1=y(0), y2=y(1), class_="bound"))
    ends = []
    for name, bins, style in reversed(curves):
        group = SubElement(svg, "g", _attributes(class_=style))
        pixels = [(x(promised), y(right)) for _, promised, right in bins]
        SubElement(group, "polyline", _attributes(points=_pairs(pixels), class_="line"))
        for (count, promised, right), (cx, cy) in zip(bins, pixels, strict=True):
            dot = SubElement(group, "circle", _attributes(cx=cx, cy=cy, r=3.2, class_="dot"))
            SubElement(
                dot, "title"
            ).text = f"{name}: {count:g} responses, promised {100 * promised:.0f}%, right {100 * right:.0f}%"
        ends.append((name, style, pixels[-1][1]))
    ends.sort(key=lambda end: end[2])
    heights = spread([end for *_, end in ends], LINE, top + 4, top + side)
    for (name, style, _), height in zip(ends, heights, strict=True):
        _text(svg, _short(name), left + side + 8, height + 4, f"end {style}")
    return _written(svg)


def _kept(name: str, bins: Sequence[tuple[float, float, float]]) -> str:
    count = sum(n for n, _, _ in bins) or 1
    promised, right = (sum(n * pair[i] for n, *pair in bins) / count for i in (0, 1))
    return f"{name}: {promised:.0%} promised, {right:.0%} right"


def stacked_bars(
    key: str, title: str, phases: Sequence[tuple[str, int]], bars: Sequence[tuple[float, Sequence[float]]]
) -> Markup:
    """Seconds of each phase (name, style) on top of each other, one bar an iteration: (iteration, seconds of each phase)."""
    names = [name for name, _ in phases]
    width, height, left, right = 700, 190, 56, 10
    svg = _svg(key, title, f"{len(bars)} bars of {', '.join(names)}", width, height)
    highest = max(sum(parts) for _, parts in bars) or 1.0
    marks = ticks(0, highest, 3)
    y = Scale(0, max(highest, marks[-1]), height - BOTTOM, TOP, marks)
    step = (width - left - right) / len(bars)
    for tick in marks:
        SubElement(svg, "line", _attributes(x1=left, x2=width - right, y1=y(tick), y2=y(tick), class_="grid"))
        _text(svg, f"{tick:g} s", left - 6, y(tick) + 4, "tick left")
    labelled = {round(i * (len(bars) - 1) / 4) for i in range(5)}
    for i, (iteration, parts) in enumerate(bars):
        bottom = 0.0
        group = SubElement(svg, "g")
        SubElement(group, "title").text = f"iteration {iteration:g}: " + ", ".join(
            f"{name} {seconds:.3g} s" for name, seconds in zip(names, parts, strict=True) if seconds
        )
        for j, seconds in enumerate(parts):
            top = bottom + seconds
            SubElement(group, "rect", _attributes(
                x=round(left + i * step + step * 0.1, 1), width=round(max(step * 0.8, 0.8), 1), y=y(top),
                height=round(y(bottom) - y(top), 1), class_=f"p{phases[j][1]}",
            ))  # fmt: skip
            bottom = top
        if i in labelled:
            _text(svg, f"{iteration:g}", left + (i + 0.5) * step, height - BOTTOM + 14, "tick middle")
    _text(svg, "EM iteration", left + (width - left - right) / 2, height - 3, "tick middle")
    return _written(svg)


def share_bar(key: str, title: str, parts: Sequence[tuple[str, int, float]]) -> Markup:
    """One bar over the whole width, divided: (name, style, seconds) of each part."""
    total = sum(value for *_, value in parts) or 1.0
    svg = _svg(key, title, ", ".join(f"{name} {value / total:.0%}" for name, _, value in parts), 700, 22)
    svg.set("preserveAspectRatio", "none")
    x = 0.0
    for name, style, value in parts:
        width = 700 * value / total
        rect = SubElement(svg, "rect", _attributes(
            x=round(x, 1), y=0, width=round(max(width - 1.5, 0.5), 1), height=22, class_=f"p{style}"
        ))  # fmt: skip
        SubElement(rect, "title").text = f"{name}: {value:.3g} s, {value / total:.0%}"
        x += width
    return _written(svg)


def spark(key: str, title: str, values: Sequence[float]) -> Markup:
    """Values in [0, 1] as a small line, without axes."""
    width, height = 160, 28
    svg = _svg(key, title, f"from {values[0]:.2f} to {values[-1]:.2f}", width, height)
    x, y = Scale(0, max(len(values) - 1, 1), 3, width - 4), Scale(0, 1, height - 3, 3)
    SubElement(svg, "line", _attributes(x1=3, x2=width - 4, y1=y(0.5), y2=y(0.5), class_="grid"))
    pixels = [(x(i), y(value)) for i, value in enumerate(values)]
    group = SubElement(svg, "g", _attributes(class_="s0"))
    SubElement(group, "polyline", _attributes(points=_pairs(pixels), class_="line"))
    SubElement(group, "circle", _attributes(cx=pixels[-1][0], cy=pixels[-1][1], r=2.6, class_="dot"))
    return _written(svg)


def ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` round numbers within [low, high]: ticks(0, 1, 4) = [0, 0.2, 0.4, 0.6, 0.8, 1]."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [float(f"{i * step:.12g}") for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _frame(svg: Element, x: Scale, y: Scale, axis: Axis, x_label: str) -> None:
    step = y.ticks[1] - y.ticks[0] if len(y.ticks) > 1 else 1.0
    for tick in y.ticks:
        SubElement(svg, "line", _attributes(x1=LEFT, x2=WIDTH - RIGHT, y1=y(tick), y2=y(tick), class_="grid"))
        _text(svg, axis.tick(tick, step), LEFT - 6, y(tick) + 4, "tick left")
    for tick in x.ticks:
        _text(svg, f"{tick:g}", x(tick), HEIGHT - BOTTOM + 14, "tick middle")
    _text(svg, x_label, (LEFT + WIDTH - RIGHT) / 2, HEIGHT - 3, "tick middle")


def _svg(key: str, title: str, description: str, width: float, height: float) -> Element:
    svg = Element("svg", {
        "viewBox": f"0 0 {width:g} {height:g}", "role": "img", "aria-labelledby": f"{key}-title {key}-desc",
    })  # fmt: skip
    SubElement(svg, "title", {"id": f"{key}-title"}).text = title
    SubElement(svg, "desc", {"id": f"{key}-desc"}).text = description
    return svg


def _spoken(curves: Sequence[Curve], axis: Axis) -> str:
    return "; ".join(
        f"{c.name} from {axis.text(c.points[0][1])} at iteration {c.points[0][0]:g} to {axis.text(c.points[-1][1])} "
        f"at {c.points[-1][0]:g}"
        for c in curves
    )


def _text(svg: Element, text: str, x: float, y: float, kind: str) -> None:
    SubElement(svg, "text", _attributes(x=round(x, 1), y=round(y, 1), class_=kind)).text = text


def _attributes(**values: object) -> dict[str, str]:
    return {name.rstrip("_"): str(value) for name, value in values.items()}


def _pairs(points: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:g},{y:g}" for x, y in points)


def _short(text: str) -> str:
    return text if len(text) <= LONGEST_LABEL else text[: LONGEST_LABEL - 1] + "\N{HORIZONTAL ELLIPSIS}"


def _widened(low: float, high: float) -> tuple[float, float]:
    """The same where they differ; else some room around the one value."""
    if high - low > 1e-12 * max(abs(low), abs(high), 1e-300):
        return low, high
    room = abs(low) * 0.1 or 1.0
    return low - room, high + room


def _written(svg: Element) -> Markup:
    return Markup(tostring(svg, encoding="unicode"))
