"""The result of `medalign separability` as text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_SCORES = ("probe", "silhouette", "neighbors")


def format_separability(found: Mapping[str, Any]) -> str:
    """Return one table per task: a row per block, and chance. Probe and neighbors are in percent."""
    texts = [f"{found['tokens']} tokens of {found['images']} images"]
    for task, chance in found["chance"].items():
        classes = ", ".join(f"{name} {count}" for name, count in found["classes"][task].items())
        lines = [[task, *_SCORES]]
        for block in found["blocks"]:
            name = f"block {block['block']}{' after W' if block['steered'] else ''}"
            lines.append([name, *(_value(block[task], score) for score in _SCORES)])
        lines.append(["(chance)", *(_value(chance, score) for score in _SCORES)])
        lines.append(["(position of the patch)", _value(chance, "position"), "", ""])
        widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
        aligned = [
            [line[0].ljust(widths[0]), *(text.rjust(width) for text, width in zip(line[1:], widths[1:], strict=True))]
            for line in lines
        ]
        texts.append(f"{task}: {classes}\n" + "\n".join("  ".join(line).rstrip() for line in aligned))
    return "\n\n".join(texts)


def _value(scores: Mapping[str, float], name: str) -> str:
    if name == "silhouette":
        return f"{scores[name]:.3f}"
    low, high = scores.get(f"{name}_low"), scores.get(f"{name}_high")
    interval = "" if low is None or high is None else f" [{100 * low:.1f}, {100 * high:.1f}]"
    return f"{100 * scores[name]:.1f}{interval}"
