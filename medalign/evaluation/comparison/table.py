"""Comparisons as text."""

from __future__ import annotations

from collections.abc import Sequence

from medalign.evaluation.comparison.compare import Comparison
from medalign.evaluation.comparison.measures import MEASURES

ALPHA = 0.05


def format_comparisons(found: Sequence[Comparison]) -> str:
    """Format comparisons as a table with aligned columns.

    Scores are in percent (BLEU in points). A star marks a difference whose adjusted p-value is below 0.05.
    """
    seeds = found[0].unit == "seed"
    last = "p (sign flip)" if seeds else "McNemar"
    lines = [["", "score", "n", f"{found[0].unit}s", found[0].baseline, "arm", "difference", "p", "p (Holm)", last]]
    lines += [_line(one) for one in found]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    aligned = [
        "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip() for line in lines
    ]
    method = "t-interval over seeds, paired t-test" if seeds else f"bootstrap and permutation test by {found[0].unit}"
    note = f"95 % intervals ({method}); Holm's adjustment is for {len(found)} tests; * below {ALPHA}"
    return "\n".join([*aligned, note])


def _line(one: Comparison) -> list[str]:
    scale = MEASURES[one.metric].scale
    star = "*" if one.p_holm < ALPHA else ""
    last = ""
    if one.p_sign_flip is not None:
        last = _p(one.p_sign_flip)
    elif one.p_mcnemar is not None:
        last = f"{one.only_baseline}:{one.only_arm}, {_p(one.p_mcnemar)}"
    return [
        one.arm,
        MEASURES[one.metric].label,
        str(one.samples),
        str(one.units),
        f"{one.baseline_score * scale:.1f}",
        f"{one.arm_score * scale:.1f}",
        f"{star}{one.difference * scale:+.1f} [{one.low * scale:.1f}, {one.high * scale:.1f}]",
        _p(one.p),
        _p(one.p_holm),
        last,
    ]


def _p(value: float) -> str:
    return "<0.001" if value < 0.001 else f"{value:.3f}"
