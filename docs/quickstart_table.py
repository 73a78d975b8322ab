"""Formats the quickstart's tables from the file of scores.

As a hook of mkdocs, it writes them into the results page. `python docs/quickstart_table.py` writes the README's table,
which a test compares with the file.
"""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from scipy import stats

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "tools/benchmarks/results/quickstart.json"
README = ROOT / "README.md"

ARMS = {
    "blind": "without the film: the most common training answer",
    "base": "base student, nothing trained",
    "language": "language loss only",
    "steered": "control: language loss and W, no teacher",
    "untrained": "control: MedAlign with a teacher of random weights",
    "medalign": "MedAlign",
}
SCORES = {
    "closed_accuracy": "closed accuracy",
    "open_exact": "open, exact",
    "open_recall": "open recall",
    "bleu": "BLEU",
    "rouge_l": "ROUGE-L",
    "attention_inside": "attention in boxes",
    "pointing_hits": "pointing hits",
}
SHORT = tuple(name for name in SCORES if name != "open_recall")  # the README's
POINTS = ("bleu",)  # from 0 to 100 already; all others are shares
COMPARED = ("language", "steered", "untrained")

Scores = Mapping[str, Mapping[str, Any]]  # score -> its mean, its spread and its value for each seed


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Replace `{{ quickstart }}` and `{{ quickstart_differences }}`."""
    if "{{ quickstart" not in markdown:
        return markdown
    facts = load()
    markdown = markdown.replace("{{ quickstart }}", scores(facts, tuple(SCORES)))
    return markdown.replace("{{ quickstart_differences }}", differences(facts))


def load() -> dict[str, Any]:
    """Read the file of scores."""
    return json.loads(RESULTS.read_text(encoding="utf-8"))


def scores(facts: Mapping[str, Any], names: Sequence[str] = SHORT) -> str:
    """Return one row per arm in the file: mean and standard deviation over the seeds, in percent."""
    rows = []
    for arm, title in ARMS.items():
        if arm in facts["arms"]:
            found: Scores = facts["arms"][arm]
            rows.append([title, *(_cell(name, found.get(name)) for name in names)])
    return _table(["", *(SCORES[name] for name in names)], rows)


def differences(facts: Mapping[str, Any]) -> str:
    """Return MedAlign minus each other arm: the difference of each seed, their mean and its 95 % t-interval."""
    rows = []
    for other in COMPARED:
        for name in ("closed_accuracy", "open_exact", "bleu"):
            if other in facts["arms"]:
                rows.append(
                    [ARMS[other].removeprefix("control: "), SCORES[name], *_compared(facts["arms"], other, name)]
                )
    return _table(["MedAlign minus", "score", "each seed", "mean", "95 % t-interval"], rows)


def paired(arms: Mapping[str, Scores], arm: str, other: str, name: str) -> list[float]:
    """Return the difference of two arms for each seed, in points of 100."""
    pairs = zip(arms[arm][name]["seeds"], arms[other][name]["seeds"], strict=True)
    return [_points(name, one - two) for one, two in pairs]


def _compared(arms: Mapping[str, Scores], other: str, name: str) -> list[str]:
    values = paired(arms, "medalign", other, name)
    mean = statistics.mean(values)
    texts = [", ".join(f"{value:+.1f}" for value in values), f"{mean:+.1f}"]
    if len(values) < 2:
        return [*texts, ""]
    half = float(stats.t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))
    return [*texts, f"{mean - half:+.1f} to {mean + half:+.1f}"]


def _cell(name: str, found: Mapping[str, Any] | None) -> str:
    if found is None:
        return ""
    spread = f" ± {_points(name, found['spread']):.1f}" if "spread" in found else ""
    return f"{_points(name, found['mean']):.1f}{spread}"


def _points(name: str, value: float) -> float:
    return value if name in POINTS else 100 * value


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _update_readme() -> None:
    """Replace the README's table of scores."""
    text = README.read_text(encoding="utf-8")
    old = r"\|  \| closed accuracy \|(?:.*\n)(?:\|.*\n)+"
    README.write_text(re.sub(old, lambda _: scores(load()) + "\n", text), encoding="utf-8")


if __name__ == "__main__":
    _update_readme()
