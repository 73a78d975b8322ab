"""The findings that a question can name, and the prompts that describe them."""

from __future__ import annotations

import itertools
import re
import string
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from medalign.errors import ConfigError

PACKAGED = Path(__file__).with_name("chest_lexicon.yaml")
_KEYS = ("words", "present", "absent")
_CLAUSE_END = re.compile(r"[.;:!?\n]+(?=\s|$)|\b(?:but|however|although|though)\b", re.IGNORECASE)
_DENIAL = re.compile(
    r"\b(?:no|not|nor|neither|never|none|without|absen(?:t|ce)|negative|den(?:y|ies|ied)|free|clear(?:ed)?|resolved|"
    r"exclude[ds]?|rule[ds]? out|unlikely|normal|unremarkable|\w+n't)\b",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Finding:
    """One entry of a lexicon.

    Attributes:
        words: words and phrases by which a question names it.
        present: prompts for images that show it.
        absent: prompts for images that do not.
    """

    words: tuple[str, ...]
    present: tuple[str, ...]
    absent: tuple[str, ...]


@dataclass(frozen=True)
class Lexicon:
    """Findings by name."""

    findings: Mapping[str, Finding]

    def named(self, question: str) -> set[str]:
        """Return the findings that a question names, by whole words, without regard to case.

        A longer phrase hides a shorter one inside it, so that "tension pneumothorax" can differ from "pneumothorax".
        """
        return {self._finding_of[match.lower()] for match in self._pattern.findall(" ".join(question.split()))}

    def stated(self, report: str) -> set[str]:
        """Return the findings that a report states as present.

        A clause ends with a sentence, a colon, a semicolon, or before "but" and "however". It states each finding that
        it names, unless it has a word that denies something, such as "no", "without" or "normal": then it states none.
        """
        clauses = [clause for clause in _CLAUSE_END.split(report) if not _DENIAL.search(clause)]
        return {finding for clause in clauses for finding in self.named(clause)}

    @cached_property
    def _finding_of(self) -> dict[str, str]:
        return {word.lower(): name for name, finding in self.findings.items() for word in finding.words}

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        longest_first = sorted(self._finding_of, key=len, reverse=True)
        return re.compile(rf"\b(?:{'|'.join(map(re.escape, longest_first))})\b", re.IGNORECASE)


def read_lexicon(path: str | Path = PACKAGED) -> Lexicon:
    """Read a lexicon from YAML: `findings` by name with `words`, `present` and `absent`, and optional `slots`.

    A prompt with slots such as "There is a {size} nodule in the {place}." stands for all its fillings.

    Raises:
        ConfigError: the file cannot be used; the message gives the entry.
    """
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        slots, findings = content.get("slots", {}), content["findings"]
        entries = {str(name): _finding(f"{path}: {name}", entry, slots) for name, entry in findings.items()}
    except (OSError, ValueError, yaml.YAMLError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"teacher.lexicon {path} cannot be used ({type(error).__name__}: {' '.join(str(error).split())}); see the "
            "packaged one in docs/teachers.md for its form"
        ) from error
    repeated = [word for word, count in _counts(entries).items() if count > 1]
    if repeated or not entries:
        fault = f"several findings have the words {', '.join(repeated)}" if repeated else "it has no findings"
        raise ConfigError(f"teacher.lexicon {path}: {fault}; give each finding its own words")
    return Lexicon(entries)


def _finding(where: str, entry: Any, slots: Mapping[str, list[str]]) -> Finding:
    if not isinstance(entry, dict) or set(entry) != set(_KEYS) or not all(_is_texts(entry[key]) for key in _KEYS):
        raise ConfigError(f"teacher.lexicon {where} must have lists of texts for {', '.join(_KEYS)}, and nothing else")
    present, absent = (tuple(text for form in entry[key] for text in _filled(form, slots)) for key in _KEYS[1:])
    return Finding(tuple(entry["words"]), present, absent)


def _is_texts(values: Any) -> bool:
    return isinstance(values, list) and bool(values) and all(isinstance(value, str) and value for value in values)


def _filled(form: str, slots: Mapping[str, list[str]]) -> list[str]:
    """All texts that a prompt with slots stands for."""
    names = [name for _, name, _, _ in string.Formatter().parse(form) if name is not None]
    fillings = itertools.product(*(slots[name] for name in names))
    return [form.format(**dict(zip(names, filling, strict=True))) for filling in fillings]


def _counts(entries: Mapping[str, Finding]) -> dict[str, int]:
    words = [word.lower() for finding in entries.values() for word in finding.words]
    return {word: words.count(word) for word in words}
