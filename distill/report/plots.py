"""Line drawings by Matplotlib: SVG that follows the page's colours, light and dark, and plain pictures."""

from __future__ import annotations

import contextlib
import io
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from xml.sax.saxutils import quoteattr

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, FAINT = "#010203", "#020304"
"""Colours that stand for the page's own in an SVG; no figure uses them as they are."""
PALETTE = ("#0b62c4", "#c2410c", "#15803d", "#9333ea", "#be185d", "#0e7490", "#854d0e", "#475569")
DARK_PALETTE = ("#6cb2ff", "#ff9b62", "#5fd38a", "#c79bff", "#ff8fb8", "#4fd0e3", "#e0b35a", "#aab8c8")
"""Colours of runs on white and on black; further runs have them again with another dash and another marker."""
MARKERS = {
    "o": "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0-8 0z",
    "s": "M-3.6-3.6h7.2v7.2h-7.2z",
    "^": "M0-4.6L4.6 4h-9.2z",
    "D": "M0-5L5 0L0 5L-5 0z",
    "v": "M0 4.6L4.6-4h-9.2z",
    "P": "M-1.7-5h3.4v3.3h3.3v3.4h-3.3v3.3h-3.4v-3.3h-3.3v-3.4h3.3z",
    "X": "M-4.6-2.2l2.4-2.4l2.2 2.2l2.2-2.2l2.4 2.4l-2.2 2.2l2.2 2.2l-2.4 2.4l-2.2-2.2l-2.2 2.2l-2.4-2.4l2.2-2.2z",
    "*": "M0-5.2L1.3-1.8L4.9-1.6L2.1 .7L3.1 4.2L0 2.2L-3.1 4.2L-2.1 .7L-4.9-1.6L-1.3-1.8z",
}
"""Markers of runs, for those who do not see the colours: Matplotlib's name → the shape around 0 as an SVG path."""
SIZE = 5.0, 3.3
"""Inches of 72 points: text of 10 points can still be read on a screen 390 pixels wide."""
DASHED = ("teacher", "measured")
"""Kinds of lines that are not drawn through."""
MANY, MARKED = 24, 5
"""Of more points than so many on a line only about so many have a marker."""
WIDE_RANGE = 30
"""A quantity above 0 whose extremes are this many times apart is drawn on a logarithmic scale."""


@dataclass(frozen=True)
class Line:
    """One line of a drawing.

    Attributes:
        x, y: points in order.
        group: position of the run among those on the page; it chooses colour and marker.
        name: for the legend.
        kind: which of several lines of a run this is, for the legend: ``student``, ``teacher``, ``measured``; empty
            where a drawing has one kind. Those of ``DASHED`` are dashed.
        sd: half the height of the error bar at each point; empty for none.
        thin: one of several repetitions.
    """

    x: Sequence[float]
    y: Sequence[float]
    group: int
    name: str
    kind: str = "student"
    sd: Sequence[float] = ()
    thin: bool = False


@dataclass(frozen=True)
class Plot:
    """A drawing and what is said of it.

    Attributes:
        key: its own on the page, of letters, digits and hyphens.
        title, x_label, y_label: for people.
        alt: what the drawing shows, for those who do not see it.
        lines: what is drawn.
        log: logarithmic y axis; None decides by the values.
        y_range: ends of the y axis; None follows the values.
        note: a remark below.
    """

    key: str
    title: str
    x_label: str
    y_label: str
    alt: str
    lines: list[Line] = field(default_factory=list)
    log: bool | None = None
    y_range: tuple[float, float] | None = None
    note: str = ""

    @property
    def legend(self) -> list[tuple[int, str, str]]:
        """Each group, name and kind once, in the order of the lines."""
        return list(dict.fromkeys((line.group, line.name, line.kind) for line in self.lines))


def svg(plot: Plot) -> str:
    """The drawing as an ``<svg>`` element: colours are CSS variables, lines of a run carry ``data-run``.

    Its bytes follow from the plot alone. The legend is left to the page.
    """
    with _settings(plot.key):
        figure = _drawn(plot, INK, FAINT, [_stand_in(group) for group in range(_groups(plot))], legend=False)
        from matplotlib.backends.backend_svg import FigureCanvasSVG

        target = io.StringIO()
        FigureCanvasSVG(figure).print_svg(target, metadata={"Date": None, "Creator": None})
    return _themed(target.getvalue(), plot)


def png(plot: Plot) -> bytes:
    """The drawing as a PNG on white with its title and legend, as TensorBoard shows it."""
    with _settings(plot.key):
        colours = [PALETTE[group % len(PALETTE)] for group in range(_groups(plot))]
        figure = _drawn(plot, "#1a1d21", "#d5d9de", colours, legend=True)
        from matplotlib.backends.backend_agg import FigureCanvasAgg

        target = io.BytesIO()
        FigureCanvasAgg(figure).print_png(target, metadata={"Software": None})
    return target.getvalue()


@contextlib.contextmanager
def _settings(salt: str) -> Iterator[None]:
    """Matplotlib's own defaults and ours, whatever the user's matplotlibrc says; afterwards all is as before."""
    import matplotlib

    ours: dict[Any, Any] = {
        "svg.hashsalt": salt,
        "svg.fonttype": "none",
        "text.parse_math": False,
        "font.size": 10.0,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.unicode_minus": True,
    }
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(ours)
        yield


def _groups(plot: Plot) -> int:
    return max((line.group for line in plot.lines), default=-1) + 1


def _stand_in(group: int) -> str:
    return f"#0a{group // 256:02x}{group % 256:02x}"


def _drawn(plot: Plot, ink: str, faint: str, colours: Sequence[str], legend: bool) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=SIZE, dpi=120, layout="constrained")
    figure.patch.set_alpha(1.0 if legend else 0.0)
    axes = figure.add_subplot()
    axes.patch.set_alpha(0.0)
    y_range = plot.y_range or (_log_range(plot) if _logarithmic(plot) else None)
    for number, line in enumerate(plot.lines):
        _add(axes, line, colours[line.group], f"{plot.key}-line{number}", y_range[0] if y_range else -math.inf)
    if _logarithmic(plot):
        axes.set_yscale("log")
    if y_range:
        axes.set_ylim(*y_range)
    axes.set_xlabel(plot.x_label, color=ink)
    axes.set_ylabel(plot.y_label, color=ink)
    axes.grid(color=faint, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(colors=ink, which="both", length=3)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda value, _: f"{value:.4g}".replace("e+0", "e").replace("e-0", "e-"))
        axis.set_minor_formatter(lambda *_: "")
    for spine in axes.spines.values():
        spine.set_color(ink)
    if legend:
        axes.set_title(plot.title, color=ink, fontsize=10)
        handles = _handles(axes, plot)
        if handles:
            axes.legend(*handles, fontsize=8, frameon=False)
    return figure


def _add(axes: Axes, line: Line, colour: str, name: str, lowest: float) -> None:
    style: dict[str, Any] = {"color": colour, "linewidth": 1.1 if line.thin else 1.8, "linestyle": dashes(line)}
    style |= {"marker": marker(line.group), "markersize": 5}
    if len(line.x) > MANY:
        step = len(line.x) // MARKED
        # Each run at another place, so that lines above each other do not hide their markers.
        style["markevery"] = step * (line.group % len(MARKERS)) // len(MARKERS), step
    (drawn,) = axes.plot(line.x, line.y, **style)
    drawn.set_gid(name)
    if any(line.sd):
        low = [max(y - sd, lowest) for y, sd in zip(line.y, line.sd, strict=True)]
        high = [y + sd for y, sd in zip(line.y, line.sd, strict=True)]
        axes.fill_between(line.x, low, high, color=colour, alpha=0.15, linewidth=0).set_gid(f"{name}-spread")


def marker(group: int) -> str:
    """A key of ``MARKERS``: the first runs have all of them, and the next with the same colours have others."""
    return list(MARKERS)[(group + group // len(PALETTE)) % len(MARKERS)]


def dashes(line: Line) -> Any:
    """By the kind of the line; runs beyond the number of colours have dots among their dashes."""
    again = line.group >= len(PALETTE)
    if line.kind in DASHED:
        return (0, (5, 2, 1, 2)) if again else (0, (4, 2))
    return (0, (1, 1.2)) if again else "solid"


def _handles(axes: Axes, plot: Plot) -> tuple[list[Any], list[str]] | None:
    drawn = {line.get_gid(): line for line in axes.lines}
    handles, labels = [], []
    for group, name, kind in plot.legend:
        number = next(n for n, line in enumerate(plot.lines) if (line.group, line.kind) == (group, kind))
        handles.append(drawn[f"{plot.key}-line{number}"])
        # A label that begins with an underscore would be left out.
        labels.append(f"\u200b{name}{', ' if kind else ''}{kind}")
    return (handles, labels) if handles else None


def _logarithmic(plot: Plot) -> bool:
    values = [y for line in plot.lines for y in line.y if math.isfinite(y)]
    if plot.log is not None or not values:
        return bool(plot.log)
    return min(values) > 0 and max(values) / min(values) > WIDE_RANGE


def _log_range(plot: Plot) -> tuple[float, float] | None:
    """Ends of a logarithmic axis: what is drawn, and a margin; a deviation that reaches 0 would take all of it."""
    drawn = [y for line in plot.lines for y in line.y if math.isfinite(y) and y > 0]
    above = [y + sd for line in plot.lines for y, sd in zip(line.y, line.sd, strict=False) if math.isfinite(y + sd)]
    if not drawn:
        return None
    low, high = min(drawn), max([*drawn, *above])
    margin = max((high / low) ** 0.05, 1.05)
    return low / margin, high * margin


def _themed(text: str, plot: Plot) -> str:
    """What Matplotlib has written, as a part of the page: its colours, its fonts, names that are unique."""
    body = text[text.index("<svg") :]
    body = re.sub(r"\s*<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = body.replace(INK, "var(--ink)").replace(FAINT, "var(--rule)")
    # A style sheet inside would hold for the whole page; fonts are the page's.
    body = re.sub(r"\s*<style.*?</style>", "", body, count=1, flags=re.DOTALL)
    body = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", body)
    body = re.sub(r"font-family: [^;\"]*;? ?", "", body)
    for number, line in enumerate(plot.lines):
        for gid in (f"{plot.key}-line{number}", f"{plot.key}-line{number}-spread"):
            body = body.replace(f'<g id="{gid}">', f'<g data-run="{line.group}">')
        body = body.replace(_stand_in(line.group), f"var(--run{line.group % len(PALETTE)})")
    used = set(re.findall(r"#([\w-]+)\"", body)) | set(re.findall(r"url\(#([\w-]+)\)", body))
    body = re.sub(r' id="([^"]+)"', lambda found: f' id="{plot.key}-{found[1]}"' if found[1] in used else "", body)
    body = re.sub(r'(href="|url\()#', rf"\1#{plot.key}-", body)
    size = re.search(r'viewBox="([^"]+)"', body)
    box = size[1] if size else ""
    opening = f'<svg role="img" aria-label={quoteattr(plot.alt)} viewBox="{box}">'
    return re.sub(r"^<svg[^>]*>", lambda _: opening, body).strip()
