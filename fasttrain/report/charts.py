"""Charts as inline SVG: lines over steps, and the reliability diagram. Their colors are the page's CSS variables."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from fasttrain.report.markup import Html, element, shorten

COLORS = 8  # of the style sheet: c0 … c7; later series repeat them with another dash
DASHES = (None, "7 3", "2 3")
_MOST_POINTS = 600  # of a line
_MOST_TIPS = 48  # points of a line that have a tooltip
_WIDTH, _HEIGHT = 380, 230
_LEFT, _RIGHT, _TOP, _BOTTOM = 48, 12, 10, 34

Points = Sequence[tuple[float, float]]


class Series(NamedTuple):
    """A line: its name, its points in the order of x, and the number of its color."""

    name: str
    points: Points
    color: int = 0


class Mark(NamedTuple):
    """A vertical line at x, with a tooltip."""

    x: float
    text: str


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers from `low` to `high`, about so many: multiples of 1, 2 or 5 times a power of ten."""
    span = high - low
    if not span > 0:
        return [low]
    raw = span / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= 0.75 * raw)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [number * step for number in range(first, last + 1)]


def figure(value: float) -> str:
    """A number as people read it."""
    if value == 0:
        return "0"
    if abs(value) >= 10_000 and abs(value) < 1e9:
        return f"{value / 1000:.4g}k" if abs(value) < 1e6 else f"{value / 1e6:.4g}M"
    return f"{value:.4g}"


def percent(value: float) -> str:
    return f"{100 * value:.4g}%"


def thin(points: Points, most: int = _MOST_POINTS) -> list[tuple[float, float]]:
    """At most about `most` of the points: of neighbors the lowest and the highest, so that no spike is lost."""
    if len(points) <= most:
        return list(points)
    size = math.ceil(2 * len(points) / most)
    kept = []
    for start in range(0, len(points), size):
        some = points[start : start + size]
        ends = {min(some, key=lambda point: point[1]), max(some, key=lambda point: point[1])}
        kept += sorted(ends)
    return kept


class _Frame(NamedTuple):
    """The scales of a chart, and what its axes look like."""

    x: Callable[[float], float]
    y: Callable[[float], float]
    axes: list[Html]


def _frame(
    xs: tuple[float, float], ys: tuple[float, float], x_label: str, x_format: Callable[[float], str],
    y_format: Callable[[float], str], height: int = _HEIGHT,
) -> _Frame:  # fmt: skip
    (x_low, x_high), (y_low, y_high) = xs, ys
    right, bottom = _WIDTH - _RIGHT, height - _BOTTOM

    def x(value: float) -> float:
        return round(_LEFT + (value - x_low) / (x_high - x_low) * (right - _LEFT), 1)

    def y(value: float) -> float:
        return round(bottom - (value - y_low) / (y_high - y_low) * (bottom - _TOP), 1)

    parts = []
    for tick in ticks(y_low, y_high, 5):
        parts.append(element("line", x1=_LEFT, x2=right, y1=y(tick), y2=y(tick), class_="grid"))
        parts.append(element("text", y_format(tick), x=_LEFT - 6, y=y(tick) + 3.5, text_anchor="end"))
    x_ticks = ticks(x_low, x_high, 5)
    for tick in x_ticks:
        parts.append(element("line", x1=x(tick), x2=x(tick), y1=bottom, y2=bottom + 4, class_="axis"))
        parts.append(element("text", x_format(tick), x=x(tick), y=bottom + 16, text_anchor="middle"))
    parts.append(element("line", x1=_LEFT, x2=right, y1=bottom, y2=bottom, class_="axis"))
    parts.append(element("text", x_label, x=right, y=height - 4, text_anchor="end", class_="label"))
    return _Frame(x, y, parts)


def _range(values: Sequence[float], *, zero: bool = False) -> tuple[float, float]:
    low, high = min(values), max(values)
    low = min(low, 0.0) if zero else low
    room = (high - low) * 0.05 or abs(high) * 0.05 or 1.0
    return (low if zero and low == 0 else low - room), high + room


def line_chart(
    title: str,
    series: Sequence[Series],
    *,
    y_format: Callable[[float], str] = figure,
    x_label: str = "step",
    zero: bool = False,
    marks: Sequence[Mark] = (),
) -> Html:
    """Lines over steps. zero: the axis starts at 0. Series without points are left out; without any, so is the chart,
    and the result is empty."""
    drawn = [each for each in series if each.points]
    if not drawn:
        return Html("")
    xs = [x for each in drawn for x, _ in each.points]
    x_range = (min(xs), max(xs)) if max(xs) > min(xs) else (min(xs) - 1, min(xs) + 1)
    frame = _frame(x_range, _range([y for each in drawn for _, y in each.points], zero=zero), x_label, figure, y_format)
    parts = [*frame.axes]
    for mark in marks:
        if x_range[0] <= mark.x <= x_range[1]:
            tip = element("title", shorten(mark.text, 160))
            at = frame.x(mark.x)
            parts.append(element("line", tip, x1=at, x2=at, y1=_TOP, y2=_HEIGHT - _BOTTOM, class_="mark"))
    for each in drawn:
        points = thin(each.points)
        path = " ".join(f"{frame.x(x):g},{frame.y(y):g}" for x, y in points)
        color = f"c{each.color % COLORS}"
        dash = DASHES[each.color // COLORS % len(DASHES)]
        parts.append(element("polyline", points=path, class_=f"line {color}", stroke_dasharray=dash))
        few = len(points) <= _MOST_TIPS
        for x, y in points[:: -(-len(points) // _MOST_TIPS)] + ([] if few else points[-1:]):
            prefix = f"{shorten(each.name, 60)}, " if len(drawn) > 1 else ""
            tip = element("title", f"{prefix}{x_label} {x:g}: {y_format(y)}")
            parts.append(element("circle", tip, cx=frame.x(x), cy=frame.y(y), r=2.2 if few else 4,
                                 class_=f"dot {color}" if few else "tip"))  # fmt: skip
    spoken = "; ".join(
        f"{shorten(each.name, 60)}: {y_format(each.points[0][1])} at {x_label} {each.points[0][0]:g}, "
        f"{y_format(each.points[-1][1])} at {x_label} {each.points[-1][0]:g}"
        for each in drawn[:8]
    )
    return _svg(f"{title}. {spoken}", parts, _HEIGHT)


def reliability_chart(confidence: Sequence[float], accuracy: Sequence[float], count: Sequence[int]) -> Html:
    """The reliability diagram: the accuracy of each bin of equal width over its mean confidence. Bins without images
    are left out; below, how many images each has."""
    height, floor = 300, 56
    frame = _frame((0.0, 1.0), (-0.25, 1.0), "confidence", _tenth, lambda y: _tenth(y) if y >= 0 else "", height)
    bins, most = len(count), max(1, *count)
    zero = frame.y(0)
    parts = [
        *(part for part in frame.axes),
        element("line", x1=_LEFT, x2=_WIDTH - _RIGHT, y1=zero, y2=zero, class_="axis"),
    ]
    parts.append(element("line", x1=frame.x(0), y1=zero, x2=frame.x(1), y2=frame.y(1), class_="ideal"))
    width = frame.x(1 / bins) - frame.x(0) - 2
    for number, images in enumerate(count):
        if not images:
            continue
        left = round(frame.x(number / bins) + 1, 1)
        says = f"{images} images at {confidence[number]:.1%} mean confidence: {accuracy[number]:.1%} right"
        bottom = height - _BOTTOM
        tall = max(1.0, (floor - 16) * images / most)
        top = frame.y(accuracy[number])
        parts.append(element("rect", element("title", says), x=left, y=top, width=round(width, 1),
                             height=round(max(zero - top, 0.5), 1), class_="bar c0"))  # fmt: skip
        parts.append(element("rect", element("title", says), x=left, y=round(bottom - tall, 1), width=round(width, 1),
                             height=round(tall, 1), class_="bar count"))  # fmt: skip
        at = frame.x(confidence[number])
        parts.append(element("line", x1=at - 3, x2=at + 3, y1=top, y2=top, class_="tickmark"))
    spoken = "; ".join(f"{confidence[n]:.1%} confident, {accuracy[n]:.1%} right" for n in range(bins) if count[n])
    return _svg(f"Reliability diagram. {spoken}", parts, height)


def _tenth(value: float) -> str:
    return f"{value:.1f}" if 0 < value < 1 else f"{value:.0f}"


def _svg(spoken: str, parts: Sequence[Html], height: int) -> Html:
    return element("svg", *parts, viewBox=f"0 0 {_WIDTH} {height}", role="img", aria_label=spoken, class_="chart")
