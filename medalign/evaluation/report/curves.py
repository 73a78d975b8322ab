"""Training curves: SVG in the colors of the page's theme, and PNG and CSV to take along."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from medalign.evaluation.report.downloads import Download, csv_uri, png_uri
from medalign.evaluation.report.runs import Arm, RunRecord

TITLES = {  # of the paper's losses; they come first, any other loss after them
    "loss/total": "total loss",
    "loss/language": "language loss",
    "loss/similarity": "spatial alignment loss",
    "loss/attention": "attention loss",
}
LOSSES = ("loss/", "validation/loss/")
LIGHT = ("#6b7785", "#d9730d", "#0b7fab", "#8b4fc6", "#2f8f4e", "#c23b74")  # of the arms; more begin again
DARK = ("#97a4b2", "#f59e4b", "#45b5e0", "#b78be8", "#66c785", "#ec7fac")
SERIES = len(LIGHT)
MAX_POINTS = 600  # of a raw curve; longer ones are thinned out
INK, RULE = "#010203", "#010204"  # stand-ins, replaced by the page's variables
PRINT_INK, PRINT_RULE = "#444f5a", "#dfe4e8"


@dataclass(frozen=True)
class Line:
    """What one run logged of a metric: the points that are drawn."""

    place: int  # of its arm
    arm: Arm
    run: RunRecord
    steps: np.ndarray
    values: np.ndarray
    curve: np.ndarray  # the values, smoothed


@dataclass(frozen=True)
class Panel:
    """One metric over the steps, with one line per run that logged it."""

    title: str
    svg: str
    download: Download


def panels(arms: Sequence[Arm]) -> list[Panel]:
    """A panel for every loss that any run logged, and the gradient's norm.

    Raw values are pale and smoothed ones strong. Of an arm with several seeds, only the smoothed values are drawn.
    """
    drawn = []
    for key, title in _titles([run for arm in arms for run in arm.runs]).items():
        lines = [
            line
            for place, arm in enumerate(arms)
            for run in arm.runs
            if (line := _line(key, place, arm, run)) is not None
        ]
        if lines:
            drawn.append(Panel(title, _svg(key, title, lines), _download(title, lines)))
    return drawn


def _titles(runs: Sequence[RunRecord]) -> dict[str, str]:
    """The title of each logged quantity, in the order of the panels."""
    logged = dict.fromkeys(key for run in runs for row in run.rows for key in row if key.startswith(LOSSES))
    losses = {
        key: TITLES.get(key) or _title(key) for key in sorted(logged, key=lambda key: not key.startswith("loss/"))
    }
    return TITLES | losses | {"optim/grad_norm": "gradient norm"}


def _title(key: str) -> str:
    split, _, name = key.rpartition("loss/")
    if split:
        return f"validation: {TITLES.get(f'loss/{name}') or _title(f'loss/{name}')}"
    return f"loss term {name}"


def smoothed(values: np.ndarray, span: int) -> np.ndarray:
    """Compute an exponential moving average with weight 2 / (span + 1), in both directions, so that it has no lag."""
    average: np.ndarray = (_average(values, span) + _average(values[::-1], span)[::-1]) / 2
    return average


def _average(values: np.ndarray, span: int) -> np.ndarray:
    keep = 1 - 2 / (span + 1)
    average, weight, averages = 0.0, 0.0, np.empty(len(values))
    for i, value in enumerate(values):
        average = keep * average + (1 - keep) * value
        weight = keep * weight + (1 - keep)  # corrects the bias of the first values towards 0
        averages[i] = average / weight
    return averages


def _line(key: str, place: int, arm: Arm, run: RunRecord) -> Line | None:
    points = [(row["step"], row[key]) for row in run.rows if row.get(key) is not None]
    if not points:
        return None
    steps, values = np.array(points, dtype=np.float64).T
    curve = smoothed(values, span=max(3, len(values) // 15))
    shown = slice(None, None, -(-len(steps) // MAX_POINTS))
    return Line(place, arm, run, steps[shown], values[shown], curve[shown])


def _svg(key: str, title: str, lines: Sequence[Line]) -> str:
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": key, "font.size": 9.0}):
        text = io.StringIO()
        figure = _draw(lines, _placeholder, INK, RULE)
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _themed(text.getvalue(), title)


def _download(title: str, lines: Sequence[Line]) -> Download:
    rows = [
        (line.run.title, int(step), float(f"{value:.6g}"), float(f"{smooth:.6g}"))
        for line in lines
        for step, value, smooth in zip(line.steps, line.values, line.curve, strict=True)
    ]
    with matplotlib.rc_context({"font.size": 9.0}):
        figure = _draw(lines, lambda place: LIGHT[place % SERIES], PRINT_INK, PRINT_RULE)
        axes = figure.axes[0]
        axes.set_title(title, loc="left", color=PRINT_INK, parse_math=False)
        strong = [curve for curve in axes.get_lines() if curve.get_alpha() is None]
        named = {line.arm.title: curve for line, curve in zip(lines, strong, strict=True)}
        legend = axes.legend(list(named.values()), list(named), frameon=False, fontsize=8, labelcolor=PRINT_INK)
        for text in legend.get_texts():
            text.set_parse_math(False)  # a "$" in a name is not a formula
        png = png_uri(figure)
    return Download(re.sub(r"\W+", "-", title), csv_uri(("run", "step", "value", "smoothed"), rows), png)


def _draw(lines: Sequence[Line], color_of: Callable[[int], str], ink: str, rule: str) -> Figure:
    figure = Figure(figsize=(4.6, 2.7), layout="constrained")
    axes = figure.add_subplot()
    for line in lines:
        color, width = color_of(line.place), 1.0
        if not line.arm.several:
            width = 1.9
            axes.plot(line.steps, line.values, color=color, alpha=0.4, linewidth=0.8)
        axes.plot(line.steps, line.curve, color=color, linewidth=width, solid_capstyle="round")
    _style(axes, np.concatenate([line.values for line in lines]), ink, rule)
    return figure


def _style(axes: Axes, values: np.ndarray, ink: str, rule: str) -> None:
    axes.set_xlabel("step", color=ink)
    axes.tick_params(colors=ink, length=0)
    axes.grid(color=rule, linewidth=0.7)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(rule)
    low, usual, high = float(values.min()), float(np.quantile(values, 0.98)), float(values.max())
    if high - low > 3 * (usual - low) > 0:
        high = usual  # a few spikes must not compress the other values
    if high > low:
        axes.set_ylim(low - 0.06 * (high - low), high + 0.08 * (high - low))


def _themed(svg: str, title: str) -> str:
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)  # ids that would occur in several panels
    svg = re.sub(r"(font(?:-family)?: (?:[\d.]+px )?)[^;\"]+", r"\1var(--font)", svg)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    for index in range(SERIES):
        svg = svg.replace(_placeholder(index), f"var(--series-{index})")
    svg = svg.replace(INK, "var(--soft)").replace(RULE, "var(--rule)")
    return svg.replace("<svg", f'<svg role="img" aria-label="{escape(title)} over the steps"', 1)


def _placeholder(index: int) -> str:
    return f"#0102{0x10 + index % SERIES:02x}"
