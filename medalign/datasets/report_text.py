"""Free-text radiology reports: their sections, and what of a study a model shall see and write."""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import zip_longest

from medalign.data.samples.sample import BadSample
from medalign.datasets.base import Setting

SECTIONS = Setting("sections", "what the report to be written consists of", "both", ("findings", "impression", "both"))
VIEWS = Setting(
    "views",
    "a study's frontal picture, all its pictures in one sample, or a sample for each",
    "frontal",
    ("frontal", "study", "all"),
)

# A heading: a line that begins with capitals and a colon. The words of a sentence before a colon are not in capitals.
_HEADING = re.compile(r"^[ \t]*([A-Z][A-Z0-9 ,&/()\-]{2,60}?)[ \t]*:", re.MULTILINE)
_WORDS = {  # what a heading holds -> the section that it begins; the first that fits counts
    "findings": r"FINDING",
    "impression": r"IMPRESSION|CONCLUSION",
    "other": r"COMPARISON|INDICATION|HISTORY|TECHNI|EXAM|STUDY|REASON|CLINICAL|RECOMMEND|NOTIF|ADDEND|READ|REPORT|"
    r"PROCEDURE|DATE|SYMPTOM|CONTRAST|DOSE",
    "view": r"\bVIEWS?\b|\bPA\b|\bAP\b|FRONTAL|LATERAL|PORTABLE|UPRIGHT|RADIOGRAPH|^CHEST",
}


def report_text(sections: Mapping[str, str], wanted: str) -> str:
    """The wanted sections as one text: "findings", "impression", or what there is of "both".

    Raises BadSample where the report has none of it.
    """
    names = ("findings", "impression") if wanted == "both" else (wanted,)
    found = " ".join(sections[name] for name in names if sections.get(name))
    if not found:
        raise BadSample(f"report has no {' or '.join(names)}")
    return found


def split_sections(report: str) -> dict[str, str]:
    """Findings and impression of a report whose sections have headings, white space folded; "" where there is none.

    A section is known by its heading's words: FINDINGS (also "FINDINGS AND IMPRESSION"), IMPRESSION or CONCLUSION.
    Where no heading says findings, those under the views' names count ("PA AND LATERAL VIEWS OF THE CHEST: ...").
    Headings of neither kind, such as "LUNGS:", belong to the section that they stand in. A section that occurs again,
    as in a report with an addendum, is joined to the first.
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
