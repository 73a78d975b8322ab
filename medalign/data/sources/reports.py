"""Free-text radiology reports: their sections, and which of them a model shall write."""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import zip_longest

from medalign.data.samples import BadSample
from medalign.data.sources.source import Setting

SECTIONS = Setting("sections", "what the report to be written consists of", "both", ("findings", "impression", "both"))

# A heading: a line that begins with capitals and a colon. The words of a sentence before a colon are not in capitals.
_HEADING = re.compile(r"^[ \t]*([A-Z][A-Z0-9 ,&/()\-]{2,60}?)[ \t]*:", re.MULTILINE)
_IMPRESSION = ("IMPRESSION", "CONCLUSION")


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

    A section is found by its heading's words: "FINDINGS", "FINDINGS AND IMPRESSION" (which is findings), "IMPRESSION",
    "CONCLUSION". Where a heading occurs again, as in a report with an addendum, the texts are joined in their order.
    """
    found: dict[str, list[str]] = {"findings": [], "impression": []}
    headings = list(_HEADING.finditer(report))
    for heading, following in zip_longest(headings, headings[1:]):
        end = following.start() if following else len(report)
        words, content = heading.group(1), " ".join(report[heading.end() : end].split())
        if not content:
            continue
        if "FINDING" in words:
            found["findings"].append(content)
        elif any(name in words for name in _IMPRESSION):
            found["impression"].append(content)
    return {name: " ".join(texts) for name, texts in found.items()}
