"""The report of a conversion: how many samples were written, and which were skipped and why."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medalign.data.shards.writer import PackReport

_REMARK = re.compile(r"\s*\([^()]*\)")
# Specific parts of a reason: brackets, quotations, and words with digits, slashes or dots (paths, names, numbers).
_PARTICULAR = re.compile(
    r"""\[[^\[\]]*\]|\{[^{}]*\}|'[^']*'|"[^"]*"|\S+\.\w\S*"""
    r"""|(?<!\S)(?!UTF-(?:8|16|32)(?:[;,]?\s|$))\S*[\d/\\]\S*?(?=;?(?:\s|$))"""
)


@dataclass(frozen=True)
class Skipped:
    """A sample that was not written."""

    key: str  # or the location in the annotations
    reason: str

    def __str__(self) -> str:
        """Return key and reason for a terminal; half characters, which it cannot display, are escaped."""
        return f"{self.key}: {self.reason}".encode("utf-8", "backslashreplace").decode("utf-8")


def kind(reason: str) -> str:
    """Reduce a reason to its general form, without names or numbers, so that equal reasons can be counted."""
    general = reason
    for pattern, replacement in ((_REMARK, ""), (_PARTICULAR, "...")):
        before = ""
        while general != before:  # brackets may be nested
            general, before = pattern.sub(replacement, general), general
    general = re.split(r"[;:](?:\s|$)", general)[0]
    general = re.sub(r"(\.\.\.\s*)+", "... ", general)
    end = general.rstrip(" .")
    return f"{end} ..." if "..." in general[len(end) :] else end


class ConversionReport:
    """What was written and skipped.

    Args:
        source: name of the converter.
        settings: its settings.
        skipped: samples that were skipped while listing; `add` appends others.
    """

    def __init__(self, source: str, settings: Mapping[str, Any], skipped: Sequence[Skipped]) -> None:
        self.source, self.settings = source, dict(settings)
        self.skipped = list(skipped)
        self.splits: dict[str, PackReport] = {}
        self.notes: Counter[str] = Counter()  # of samples that were written, for example ignored frames

    def add(self, split: str, joined: tuple[PackReport, Sequence[Skipped]]) -> None:
        """Add what was written and skipped in a split."""
        self.splits[split] = joined[0]
        self.skipped += joined[1]
        self.notes.update(joined[0].notes)

    @property
    def written(self) -> int:
        """Number of samples written."""
        return sum(report.written for report in self.splits.values())

    def reasons(self) -> dict[str, int]:
        """Return the number of skipped samples per general reason, the most frequent first."""
        return dict(Counter(kind(one.reason) for one in self.skipped).most_common())

    def summary(self) -> str:
        """Return the reasons with their counts in one line."""
        return "; ".join(f"{count} x {reason}" for reason, count in self.reasons().items()) or "nothing was skipped"

    def first(self) -> str:
        """Return the first skipped sample and its reason, to follow the counts, or "" if nothing was skipped."""
        return f"; first: {self.skipped[0]}" if self.skipped else ""

    def write(self, path: Path) -> None:
        """Write the report as JSON, atomically and readable only by its owner, because it names samples."""
        value = {
            "source": self.source,
            "settings": self.settings,
            "splits": {name: {"written": r.written, "shards": r.shards} for name, r in self.splits.items()},
            "notes": dict(self.notes.most_common()),
            "skipped": self.reasons(),
            "skipped_samples": [{"key": one.key, "reason": one.reason} for one in self.skipped],
        }
        partial = path.with_name(f".{path.name}.partial")
        partial.touch(mode=0o600)
        text = json.dumps(value, ensure_ascii=False, indent=1, default=str) + "\n"
        partial.write_text(text, encoding="utf-8", errors="backslashreplace")  # names may contain half characters
        partial.replace(path)
