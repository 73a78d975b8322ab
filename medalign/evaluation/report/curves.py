"""Training curves as SVG. Their colors are CSS variables of the page, so that they follow its light or dark theme."""

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

TITLES = {  # of the paper's losses; they come first, any other loss after them
    "loss/total": "total loss",
    "loss/language": "language loss",
    "loss/similarity": "spatial alignment loss",
    "loss/attention": "attention loss",
}
LOSSES = ("loss/", "validation/loss/")
SERIES = 6  # colors of the page; more runs begin again
MAX_POINTS = 600  # of a raw curve; longer ones are thinned out
INK, RULE = "#010203", "#010204"  # stand-ins, replaced by the page's variables


@dataclass(frozen=True)
class Panel:
    """One metric over the steps, with one line per run that logged it."""

    title: str
    svg: str


def panels(runs: Sequence[RunRecord]) -> list[Panel]:
    """A panel for every loss that any run logged, and the gradient's norm: raw values pale, smoothed values strong."""
    drawn = []
    for key, title in _titles(runs).items():
        series = [(number, *_series(run, key)) for number, run in enumerate(runs)]
        present = [(number, steps, values) for number, steps, values in series if len(steps)]
        if present:
            drawn.append(Panel(title, _draw(key, title, present)))
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


def _series(run: RunRecord, key: str) -> tuple[np.ndarray, np.ndarray]:
    points = [(row["step"], row[key]) for row in run.rows if row.get(key) is not None]
    steps, values = np.array(points, dtype=np.float64).reshape(-1, 2).T
    return steps, values


def _draw(key: str, title: str, series: Sequence[tuple[int, np.ndarray, np.ndarray]]) -> str:
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": key, "font.size": 9.0}):
        figure = Figure(figsize=(4.6, 2.7), layout="constrained")
        axes = figure.add_subplot()
        for index, steps, values in series:
            color = _placeholder(index)
            stride = -(-len(steps) // MAX_POINTS)
            axes.plot(steps[::stride], values[::stride], color=color, alpha=0.4, linewidth=0.8)
            curve = smoothed(values, span=max(3, len(values) // 15))
            axes.plot(steps[::stride], curve[::stride], color=color, linewidth=1.9, solid_capstyle="round")
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
    return svg.replace("<svg", f'<svg role="img" aria-label="{title} over the steps"', 1)


def _placeholder(index: int) -> str:
    return f"#0102{0x10 + index % SERIES:02x}"
