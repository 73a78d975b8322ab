"""Free-text radiology reports: their sections, and settings for what a sample contains of a study."""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import zip_longest
from typing import Any

from medalign.data.samples.sample import BadSample
from medalign.datasets.base import Item, Setting

SECTIONS = Setting("sections", "sections of the target report", "both", ("findings", "impression", "both"))
VIEWS = Setting(
    "views",
    "the frontal image of a study, all its images in one sample, or one sample per image",
    "frontal",
    ("frontal", "study", "all"),
)

# A heading: upper-case words and a colon at the start of a line. Words before a colon in a sentence are in lower case.
_HEADING = re.compile(r"^[ \t]*([A-Z][A-Z0-9 ,&/()\-]{2,60}?)[ \t]*:", re.MULTILINE)
_WORDS = {  # section -> words of the headings that begin it; the first match counts
    "findings": r"FINDING",
    "impression": r"IMPRESSION|CONCLUSION",
    "other": r"COMPARISON|INDICATION|HISTORY|TECHNI|EXAM|STUDY|REASON|CLINICAL|RECOMMEND|NOTIF|ADDEND|READ|REPORT|"
    r"PROCEDURE|DATE|SYMPTOM|CONTRAST|DOSE",
    "view": r"\bVIEWS?\b|\bPA\b|\bAP\b|FRONTAL|LATERAL|PORTABLE|UPRIGHT|RADIOGRAPH|^CHEST",
}


def report_fields(item: Item, report: str) -> dict[str, Any]:
    """Return the fields that all samples with a report have: the question is the default prompt."""
    return {"id": item.key, "task": "report", "question": "", "report": report, "split": item.split}


def report_text(sections: Mapping[str, str], wanted: str) -> str:
    """Join the wanted sections to one text.

    Args:
        sections: text of each section.
        wanted: "findings", "impression", or "both" for those that exist.

    Raises:
        BadSample: the report has none of them.
    """
    names = ("findings", "impression") if wanted == "both" else (wanted,)
    found = " ".join(sections[name] for name in names if sections.get(name))
    if not found:
        raise BadSample(f"report has no {' or '.join(names)}")
    return found


def split_sections(report: str) -> dict[str, str]:
    """Extract findings and impression from a report with headings, with white space folded; "" if one is missing.

    A section is recognized by words in its heading: FINDINGS (also "FINDINGS AND IMPRESSION"), IMPRESSION or
    CONCLUSION. Without a heading for findings, the text under a heading that names the views is used ("PA AND LATERAL
    VIEWS OF THE CHEST: ..."). Text under other headings, such as "LUNGS:", belongs to the section around it. If a
    section occurs again, for example in an addendum, its text is appended.
    """
    headings = list(_HEADING.finditer(report))
    kinds = [_kind(heading.group(1)) for heading in headings]
    if "findings" not in kinds:
        kinds = ["findings" if kind == "view" else kind for kind in kinds]
    found: dict[str, list[str]] = {"findings": [], "impression": []}
    section = "other"
    for heading, kind, following in zip_longest(headings, kinds, headings[1:]):
        start = heading.end()
        if kind in (*found, "other"):
            section = kind
        else:
            start = heading.start()
        content = " ".join(report[start : following.start() if following else len(report)].split())
        if section in found and content:
            found[section].append(content)
    return {name: " ".join(texts) for name, texts in found.items()}


def _kind(heading: str) -> str:
    return next((kind for kind, words in _WORDS.items() if re.search(words, heading)), "")
