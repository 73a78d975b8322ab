"""A picture of visual tokens in two dimensions: one panel per set of tokens, with a color for each class."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

OUTSIDE = "#b8bec6"
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # Okabe and Ito: seen by the color-blind
MARKERS = "os^DvP"  # a second sign for each color


def draw_tokens(panels: Sequence[tuple[str, np.ndarray]], label_T: np.ndarray, outside: str, path: Path) -> None:
    """Draw panels of coordinates side by side, and write them as PNG.

    Args:
        panels: the title and the coordinates [T, 2] of each panel.
        label_T: the class of each token, the same for all panels.
        outside: the class that is drawn gray, below the others.
        path: the file.
    """
    figure = Figure(figsize=(4.6 * len(panels), 4.9), layout="constrained", dpi=150)
    classes = [outside, *sorted(set(label_T.tolist()) - {outside})]
    for number, (title, place_T2) in enumerate(panels, start=1):
        axes = figure.add_subplot(1, len(panels), number)
        for order, name in enumerate(classes):
            chosen = place_T2[label_T == name]
            color = OUTSIDE if name == outside else COLORS[(order - 1) % len(COLORS)]
            marker = "." if name == outside else MARKERS[(order - 1) % len(MARKERS)]
            axes.scatter(chosen[:, 0], chosen[:, 1], s=12, c=color, marker=marker, linewidths=0, alpha=0.75, label=name)
        axes.set_title(title, fontsize=11)
        axes.set_xticks([])
        axes.set_yticks([])
        for spine in axes.spines.values():
            spine.set_color("#d5d9de")
    handles, names = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=min(len(names), 5), frameon=False, markerscale=2)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png")
