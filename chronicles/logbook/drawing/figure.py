"""The curves as inline SVG: drawn by matplotlib, coloured by the page.

Colours leave here as CSS variables, so that one drawing serves a light and a dark page, and text stays text in the
page's own font. The bytes depend on the data alone: no date, no random ids.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import nan
from statistics import quantiles
from typing import TYPE_CHECKING, Any

from chronicles.logbook.drawing.curves import Curve, Line, Mark, curve, marks, thinned, validation
from chronicles.record import LineageRecord
from chronicles.wording import rate

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

RUN_COLORS = 6  # the page defines --run-0 … --run-5; later runs use them again

# Colours that stand for the page's variables. matplotlib wants real ones; these occur nowhere else.
_INK, _MUTED, _RULE, _BAD, _PAPER = "#010101", "#010102", "#010103", "#010104", "#010105"
_RUNS = [f"#0101{16 + place:02x}" for place in range(RUN_COLORS)]
_VARIABLES = {_INK: "ink", _MUTED: "muted", _RULE: "rule", _BAD: "bad", _PAPER: "paper"} | {
    color: f"run-{place}" for place, color in enumerate(_RUNS)
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """A drawing's measures in CSS pixels: it is shown at its own size, so that its text is as large as the page's."""

    name: str
    width: int
    font: float
    points: int  # per panel, about
    lanes: int  # of the strip of incidents
    left: int = 46
    right: int = 20  # half of the last step's label
    gap: int = 34  # above each panel, for its heading


WIDE = Size(name="wide", width=820, font=11, points=1600, lanes=4)
MIDDLE = Size(name="middle", width=560, font=11, points=1000, lanes=4)
NARROW = Size(name="narrow", width=350, font=11, points=600, lanes=4, left=42)

SIZES = (WIDE, MIDDLE, NARROW)

_PANELS = {
    "loss": ("Loss, nats per token", 190),
    "valid": ("Validation loss, nats per token", 120),
    "gnorm": ("Gradient norm", 104),
    "lr": ("Learning rate", 104),
}
_LANE, _FOOT = 15, 40
_DOTS = 80  # values, each of which gets one: a line through few points looks as if it knew what lies between


def draw(record: LineageRecord, report: Mapping[str, Any]) -> list[str]:
    """The measures over all runs, in each of `SIZES`; none before there is any telemetry. Without evaluation, three."""
    curves = {measure: validation(record) if measure == "valid" else curve(record, measure) for measure in _PANELS}
    if not curves["valid"].lines and not curves["valid"].gaps:
        del curves["valid"]
    if not any(drawn.lines or drawn.gaps for drawn in curves.values()):
        return []
    drawings: list[str] = []
    for size in SIZES:  # each from the one before: what was thinned once is quickly thinned again
        curves = {measure: thinned(drawn, size.points) for measure, drawn in curves.items()}
        drawings.append(_draw(curves, marks(report), size))
    return drawings


def _draw(curves: Mapping[str, Curve], placed: Sequence[Mark], size: Size) -> str:
    from matplotlib import rc_context

    style: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": f"opt-ops/{size.name}",
        "font.family": "sans-serif",
        "font.size": size.font,
        "axes.linewidth": 0,
        "path.simplify": True,
    }
    with rc_context(style):
        return _themed(_svg(_figure(curves, placed, size)), size)


def _figure(curves: Mapping[str, Curve], placed: Sequence[Mark], size: Size) -> Figure:
    from matplotlib.figure import Figure

    steps = [step for drawn in curves.values() for line in drawn.lines for step in (line.steps[0], line.steps[-1])]
    steps += [step for drawn in curves.values() for step in drawn.gaps]
    low, high = min(steps), max(*steps, min(steps) + 1)
    scale = (size.width - size.left - size.right) / (high - low)
    lanes = _lanes(placed, size, low, scale)
    strip = _LANE * (1 + max((lane for lane, _ in lanes), default=-1))
    height = strip + sum(size.gap + _PANELS[measure][1] for measure in curves) + _FOOT
    figure = Figure(figsize=(size.width / 72, height / 72), dpi=72)
    figure.patch.set_alpha(0)

    def place(top: float, tall: float) -> Axes:
        share = (size.left / size.width, 1 - (top + tall) / height)
        axes = figure.add_axes((*share, 1 - (size.left + size.right) / size.width, tall / height))
        axes.set_xlim(low, high)
        axes.patch.set_alpha(0)
        axes.tick_params(which="both", length=0, labelcolor=_MUTED, labelsize=size.font - 0.5, pad=6)
        return axes

    if strip:
        _draw_strip(place(0, strip), placed, lanes, strip // _LANE, scale)
    top = strip
    for measure, drawn in curves.items():
        heading, tall = _PANELS[measure]
        top += size.gap
        axes = place(top, tall)
        _draw_panel(axes, drawn, placed, measure)
        where = {"xycoords": "axes pixels", "annotation_clip": False}
        axes.annotate(heading, (-size.left + 2, tall + 11), color=_INK, weight="bold", size=size.font, **where)
        _draw_steps(axes, size, last=measure == list(curves)[-1])
        top += tall
    return figure


def _draw_steps(axes: Axes, size: Size, last: bool) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(nbins=max(4, size.width // 100), integer=True, steps=[1, 2, 2.5, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda step, _: f"{step:,.0f}"))
    if last:
        axes.set_xlabel("step", color=_MUTED, size=size.font - 0.5, labelpad=4)
    else:
        axes.tick_params(labelbottom=False)


def _draw_panel(axes: Axes, drawn: Curve, placed: Sequence[Mark], measure: str) -> None:
    low, high = _heights(drawn, log=measure == "gnorm")
    if measure == "gnorm":
        axes.set_yscale("log")
    axes.set_ylim(low, high)
    _draw_values(axes, measure)
    faint = max(0.2, min(0.55, 12 / max(1, len(placed))))  # many incidents must not hide the curve
    for quiet in (False, True):
        at = [mark.step for mark in placed if mark.quiet is quiet]
        style: dict[str, Any] = {"color": _MUTED, "linewidth": 0.8, "alpha": faint}
        axes.vlines(
            at, 0, 1, transform=axes.get_xaxis_transform(), linestyles=(0, (2, 3)) if quiet else "solid", **style
        )
    few = measure == "valid" and sum(len(line.steps) for line in drawn.lines) <= _DOTS
    dots: dict[str, Any] = {"marker": "o", "markersize": 3.5} if few else {}
    for kept in (False, True):  # what counts is drawn on top
        for place, color in enumerate(_RUNS):
            lines = [line for line in drawn.lines if line.kept is kept and line.run % RUN_COLORS == place]
            steps, values = _joined(lines)
            if kept:
                axes.plot(steps, values, color=color, linewidth=1.4, solid_joinstyle="round", **dots)
            else:
                axes.plot(steps, values, color=color, linewidth=1, alpha=0.7, dashes=(3, 2), **dots)
    _mark_peaks(axes, drawn.lines, measure)
    _letter(axes, drawn.labels)
    if drawn.gaps:
        axes.plot(
            list(drawn.gaps),
            [0.94] * len(drawn.gaps),
            transform=axes.get_xaxis_transform(),
            color=_BAD,
            linestyle="none",
            marker="x",
            markersize=6,
        )


def _letter(axes: Axes, labels: Sequence[tuple[int, float, str]]) -> None:
    """Names at the ends of lines, moved down where one would hide another; those that no room is left for are not."""
    low, high = axes.get_ylim()
    room = 11 / axes.get_window_extent().height * (high - low)
    lowest = high
    for step, value, name in sorted(labels, key=lambda label: -label[1]):
        lowest = min(value, lowest - room)
        if lowest < low - room:
            return
        where = {"xytext": (6, 0), "textcoords": "offset points", "annotation_clip": False}
        axes.annotate(name, (step, lowest), color=_INK, va="center", **where)


def _joined(lines: Sequence[Line]) -> tuple[list[float], list[float]]:
    """Many lines as one that is broken between them: a thousand artists would take seconds to draw."""
    steps: list[float] = []
    values: list[float] = []
    for line in lines:
        steps += [*line.steps, nan]
        values += [*line.values, nan]
    return steps, values


def _mark_peaks(axes: Axes, lines: Sequence[Line], measure: str) -> None:
    """Peaks beyond the panel: a mark at its edge, and the height unless a higher one is told nearby."""
    edge, top = axes.get_xaxis_transform(), axes.get_ylim()[1]
    room = 48 / axes.get_window_extent().width * (axes.get_xlim()[1] - axes.get_xlim()[0])
    told: list[float] = []
    for line in sorted(lines, key=lambda line: -max(line.values)):
        peak = max(line.values)
        if peak <= top:
            return
        step = line.steps[line.values.index(peak)]
        axes.plot([step], [0.985], transform=edge, color=_RUNS[line.run % RUN_COLORS], marker="^", markersize=5)
        if any(abs(step - other) < room for other in told):
            continue
        told.append(step)
        height = rate(peak) if measure == "lr" else f"{peak:.3g}"
        where = {"xytext": (7, -3), "textcoords": "offset points", "xycoords": edge}
        axes.annotate(height, (step, 0.985), color=_MUTED, va="center", **where)


def _draw_values(axes: Axes, measure: str) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    axes.grid(axis="y", color=_RULE, linewidth=1)
    axes.set_axisbelow(True)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda number, _: rate(number) if measure == "lr" else f"{number:g}"))
    if measure == "gnorm":
        axes.yaxis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5), numticks=6))
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.yaxis.set_major_locator(MaxNLocator(nbins={"loss": 5, "valid": 4}.get(measure, 3), steps=[1, 2, 5, 10]))


def _heights(drawn: Curve, log: bool) -> tuple[float, float]:
    """The panel's range: all that counts, and of what was taken back no more than keeps the rest readable.

    A few wild points (the first steps of a long run, a drill's learning rate) would flatten everything else; they are
    drawn to the edge and marked there.
    """
    kept = sorted(value for line in drawn.lines if line.kept for value in line.values)
    every = [value for line in drawn.lines for value in line.values]
    if not every:
        return (0.1, 10.0) if log else (0.0, 1.0)
    kept = kept or sorted(every)
    low, high = kept[0], kept[-1]
    if len(kept) >= 40:
        inner = quantiles(kept, n=20)
        if high - low > 4 * (inner[-1] - inner[0]) and not log:
            high = min(high, inner[-1] + 1.5 * (inner[-1] - inner[0]))
    if log:
        low, high = min(every), max(every)
        return max(low, 1e-9) / 1.3, max(high, 1e-9) * 1.3
    room = (high - low) or abs(high) or 1.0
    high = min(max(every), high + 0.35 * room)
    return min(every) - 0.06 * room, high + 0.08 * room


def _lanes(placed: Sequence[Mark], size: Size, low: int, scale: float) -> list[tuple[int, bool]]:
    """For each mark its lane in the strip, and whether there is room for its name; names never overlap."""
    right = size.width - size.left - size.right
    label = 34.0
    taken: list[list[tuple[float, float]]] = [[] for _ in range(size.lanes)]
    found: list[tuple[int, bool]] = []
    for mark in placed:
        end = (mark.step - low) * scale
        start = (min(mark.resumed, mark.step) - low) * scale if mark.resumed is not None else end
        span = (start - label - 8, end + 8) if end + label > right else (start - 6, end + label)
        free = next(
            (lane for lane, used in enumerate(taken) if all(b <= span[0] or a >= span[1] for a, b in used)), None
        )
        if free is None:
            found.append((size.lanes - 1, False))
            continue
        taken[free].append(span)
        found.append((free, True))
    return found


def _draw_strip(axes: Axes, placed: Sequence[Mark], lanes: Sequence[tuple[int, bool]], tall: int, scale: float) -> None:
    axes.set_ylim(tall, 0)
    axes.set_axis_off()
    high = axes.get_xlim()[1]
    # Where the strip is full, stems are short; the table of incidents names them all.
    tops = [lane + 0.5 if named else tall - 0.3 for lane, named in lanes]
    axes.vlines([mark.step for mark in placed], tops, tall, color=_MUTED, linewidth=0.8, alpha=0.55, clip_on=False)
    for mark, (lane, named) in zip(placed, lanes, strict=True):
        height = lane + 0.5
        if not named:
            continue
        if mark.resumed is not None and (mark.step - mark.resumed) * scale > 6:
            axes.plot([mark.resumed, mark.step], [height, height], color=_MUTED, linewidth=1, clip_on=False)
            axes.plot([mark.resumed], [height], color=_MUTED, marker="<", markersize=4, clip_on=False)
        axes.plot([mark.step], [height], color=_INK, marker="o", markersize=4, clip_on=False)
        left = (high - mark.step) * scale < 34
        start = min(mark.resumed, mark.step) if mark.resumed is not None else mark.step
        text = axes.annotate(
            mark.incident.rsplit("-", 1)[-1],
            (start if left else mark.step, height),
            xytext=(-7 if left else 7, 0),
            textcoords="offset points",
            ha="right" if left else "left",
            va="center_baseline",
            color=_INK,
            annotation_clip=False,
        )
        text.set_url(f"#{mark.incident}")


def _svg(figure: Figure) -> str:
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    drawn = io.StringIO()
    FigureCanvasSVG(figure).print_svg(drawn)
    return drawn.getvalue()


def _themed(svg: str, size: Size) -> str:
    """The drawing as part of a page: no prologue, the page's colours and font, its own width at most."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)  # it has the date
    label = "Loss, gradient norm and learning rate by step, and the loss on validation data where there is any"
    box = re.search(r'viewBox="([^"]+)"', svg)
    assert box is not None
    head = f'<svg class="curves {size.name}" viewBox="{box[1]}" role="img" aria-label="{label}">'
    svg = head + svg[svg.index(">") + 1 :]
    svg = svg.replace("xlink:href", "href").replace(' target="_blank"', "")
    svg = re.sub(r"<style.*?</style>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<g id=\"[^\"]*\"", "<g", svg)  # two drawings on one page must not share ids
    svg = re.sub(r"font-family: [^;\"]*; ?", "", svg)
    svg = re.sub(r"<[^>]+>", _short_numbers, svg)
    svg = re.sub(r" ?\n(?=[LMz\"])", " ", svg)
    return re.sub(r"#0101[0-9a-f]{2}", lambda color: f"var(--{_VARIABLES[color[0]]})", svg).strip()


def _short_numbers(tag: re.Match[str]) -> str:
    """Coordinates to a tenth of a pixel; text stands outside of tags and is left alone."""
    return re.sub(r"\d+\.\d{3,}", lambda number: f"{float(number[0]):.1f}", tag[0])
