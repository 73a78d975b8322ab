"""Curves of the training as SVG whose colors are the page's own, so that they follow its light and dark."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from medalign.evaluation.report.runs import RunRecord

PANELS = {
    "loss/total": "total loss",
    "loss/language": "language loss",
    "loss/similarity": "spatial alignment loss",
    "loss/attention": "attention loss",
    "optim/grad_norm": "gradient norm",
}
SERIES = 6  # colors of the page; more runs begin again
MAX_POINTS = 600  # of a raw curve; more are thinned out
INK, RULE = "#010203", "#010204"  # stand-ins, replaced by the page's variables


@dataclass(frozen=True)
class Panel:
    """One quantity over the steps, a line for each run that has it."""

    title: str
    svg: str


def panels(runs: Sequence[RunRecord]) -> list[Panel]:
    """A panel for each quantity that any run has: the raw values pale, their smoothed course strong."""
    drawn = []
    for key, title in PANELS.items():
        series = [(number, *_series(run, key)) for number, run in enumerate(runs)]
        present = [(number, steps, values) for number, steps, values in series if len(steps)]
        if present:
            drawn.append(Panel(title, _draw(key, title, present)))
    return drawn


def smoothed(values: np.ndarray, span: int) -> np.ndarray:
    """Exponential moving average with weight 2 / (span + 1), both ways, so that it neither lags nor leads."""
    return (_average(values, span) + _average(values[::-1], span)[::-1]) / 2


def _average(values: np.ndarray, span: int) -> np.ndarray:
    keep = 1 - 2 / (span + 1)
    average, weight, course = 0.0, 0.0, np.empty(len(values))
    for i, value in enumerate(values):
        average = keep * average + (1 - keep) * value
        weight = keep * weight + (1 - keep)  # frees the start of its bias towards 0
        course[i] = average / weight
    return course


def _series(run: RunRecord, key: str) -> tuple[np.ndarray, np.ndarray]:
    points = [(row["step"], row[key]) for row in run.rows if row.get(key) is not None]
    steps, values = np.array(points, dtype=np.float64).reshape(-1, 2).T
    return steps, values


def _draw(key: str, title: str, series: Sequence[tuple[int, np.ndarray, np.ndarray]]) -> str:
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": key, "font.size": 9.0}):
        figure = Figure(figsize=(4.6, 2.7), layout="constrained")
        axes = figure.add_subplot()
        for number, steps, values in series:
            color = _stand_in(number)
            every = -(-len(steps) // MAX_POINTS)
            axes.plot(steps[::every], values[::every], color=color, alpha=0.4, linewidth=0.8)
            course = smoothed(values, span=max(3, len(values) // 15))
            axes.plot(steps[::every], course[::every], color=color, linewidth=1.9, solid_capstyle="round")
        _style(axes, np.concatenate([values for _, _, values in series]))
        text = io.StringIO()
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _themed(text.getvalue(), title)


def _style(axes: Axes, values: np.ndarray) -> None:
    axes.set_xlabel("step", color=INK)
    axes.tick_params(colors=INK, length=0)
    axes.grid(color=RULE, linewidth=0.7)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(RULE)
    low, usual, high = float(values.min()), float(np.quantile(values, 0.98)), float(values.max())
    if high - low > 3 * (usual - low) > 0:
        high = usual  # a few spikes must not flatten the rest
    if high > low:
        axes.set_ylim(low - 0.06 * (high - low), high + 0.08 * (high - low))


def _themed(svg: str, title: str) -> str:
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)  # names that would repeat from panel to panel
    svg = re.sub(r"(font(?:-family)?: (?:[\d.]+px )?)[^;\"]+", r"\1var(--font)", svg)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    for number in range(SERIES):
        svg = svg.replace(_stand_in(number), f"var(--series-{number})")
    svg = svg.replace(INK, "var(--soft)").replace(RULE, "var(--rule)")
    return svg.replace("<svg", f'<svg role="img" aria-label="{title} over the steps"', 1)


def _stand_in(number: int) -> str:
    return f"#0102{0x10 + number % SERIES:02x}"
