"""The result of `medalign ground` as text, and its heads as a table of comma-separated values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from medalign.evaluation.ground_records import KINDS

HEADS_SHOWN = 5
_ROWS = (  # label, key, key of what a uniform map scores
    ("inside the boxes", "inside", "inside_uniform"),
    ("pointing hits", "pointing_hits", "pointing_chance"),
    ("average precision", "box_ap", "box_ap_uniform"),
    ("IoU", "box_iou", "box_iou_uniform"),
)
_MASK_ROWS = (
    ("inside the mask", "inside", "inside_uniform"),
    ("average precision, mask", "mask_ap", "mask_ap_uniform"),
    ("IoU, mask", "mask_iou", "mask_iou_uniform"),
)


def format_grounding(found: Mapping[str, Any]) -> str:
    """Return a result as text, in percent: maps beside chance, removal, and the heads with most inside the boxes."""
    empty = f", {found['answers_empty']} answers without text" if found["answers_empty"] else ""
    lines = [[f"{found['n']} samples, {found['images']} images{empty}", "question", "answer", "uniform"]]
    for rows, suffix in ((_ROWS, ""), (_MASK_ROWS, "_mask")):
        parts = [found.get(kind + suffix, {}) for kind in KINDS]
        for label, key, chance in rows:
            if key in parts[0]:
                lines.append([label, *(_value(part, key) for part in parts), _share(parts[0], chance)])
    text = [_aligned(lines)]
    if removal := found.get("removal"):
        head = ["area under the curve of the answer's probability", "map", "random", "gain"]
        areas = [
            [name, _share(removal, name), _share(removal, f"{name}_random"), _value(removal, f"{name}_gain")]
            for name in ("deletion", "insertion")
        ]
        text.append(_aligned([head, *areas]))
    return "\n\n".join([*text, _best_heads(found)])


def heads_csv(found: Mapping[str, Any]) -> str:
    """Return one line per kind of rows, block and head: the share inside the boxes, and the attention to the image."""
    lines = ["rows,block,head,inside,on_image"]
    for kind, heads in found["heads"].items():
        for block, (inside, on_image) in enumerate(zip(heads["inside"], heads["on_image"], strict=True)):
            for head, values in enumerate(zip(inside, on_image, strict=True)):
                lines.append(f"{kind},{block},{head}," + ",".join(f"{value:.6g}" for value in values))
    return "\n".join(lines) + "\n"


def _best_heads(found: Mapping[str, Any]) -> str:
    heads = found["heads"][KINDS[0]]
    places = [(inside, block, head) for block, row in enumerate(heads["inside"]) for head, inside in enumerate(row)]
    chosen = sorted(places, key=lambda place: -place[0])[:HEADS_SHOWN]
    lines = [["heads with most inside the boxes", "inside", "on the image"]]
    for inside, block, head in chosen:
        lines.append(
            [f"block {block}, head {head}", f"{100 * inside:.1f}", f"{100 * heads['on_image'][block][head]:.1f}"]
        )
    return _aligned(lines)


def _share(part: Mapping[str, float], key: str) -> str:
    return f"{100 * part[key]:.1f}" if key in part else "-"


def _value(part: Mapping[str, float], key: str) -> str:
    if key not in part:
        return "-"
    return f"{_share(part, key)} [{_share(part, key + '_low')}, {_share(part, key + '_high')}]"


def _aligned(lines: Sequence[Sequence[str]]) -> str:
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join(
        "  ".join(
            [line[0].ljust(widths[0]), *(text.rjust(width) for text, width in zip(line[1:], widths[1:], strict=True))]
        )
        for line in lines
    )
