"""The scores that a report shows. A score that no run has is left out, so a new one needs only its line here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from medalign.evaluation.probes import catalog as probes
from medalign.evaluation.report.runs import Evaluation

Values = Mapping[str, Any]
# The tables of a data set.
ANSWERS, REPORTS, FINDINGS = "Answers", "Reports", "Findings of reports"
ATTENTION, ASKED = "Attention", "Attention to what was asked"
LOST, STATED = "Accuracy lost under probes", "Questions about findings"


def _in_file(evaluation: Evaluation) -> Values:
    return evaluation.scores


@dataclass(frozen=True)
class Column:
    """One score: its keys in scores.json, and how it is shown.

    Attributes:
        key: of the score. Dots lead into nested objects, as in "probes.blank.accuracy".
        label: its name in tables.
        count: key of the number of samples.
        group: the table that it is in.
        scale: factor for tables; fractions are shown in percent.
        chance: key of the score without the image.
        chance_label: what that is.
        better: "higher" or "lower"; empty if neither is better, so that a text table marks none as the best.
        sentence: its name in a sentence, by default the label.
        source: what the keys refer to, by default scores.json.
    """

    key: str
    label: str
    count: str
    group: str = ANSWERS
    scale: float = 100.0
    chance: str = ""
    chance_label: str = ""
    better: str = "higher"
    sentence: str = ""
    source: Callable[[Evaluation], Values] = _in_file

    @property
    def subject(self) -> str:
        """The name of the score in a sentence."""
        return self.sentence or self.label

    def read(self, evaluation: Evaluation, key: str) -> Any:
        """Return the value of one of the column's keys, or None if the evaluation does not have it."""
        found: Any = self.source(evaluation)
        for part in key.split("."):
            found = found.get(part) if isinstance(found, Mapping) else None
        return found

    def score(self, evaluation: Evaluation, suffix: str = "") -> float | None:
        """Return the score in the unit of the table; with a suffix such as "_low", an end of its interval."""
        return self._scaled(self.read(evaluation, self.key + suffix))

    def by_chance(self, evaluation: Evaluation) -> float | None:
        """Return the score without the image, in the unit of the table."""
        return self._scaled(self.read(evaluation, self.chance)) if self.chance else None

    def _scaled(self, value: float | None) -> float | None:
        return None if value is None else value * self.scale


COLUMNS = (
    Column("closed_accuracy", "closed accuracy", "closed_n", chance="closed_majority", chance_label="majority answer"),
    Column("open_recall", "open recall", "open_n"),
    Column("open_exact", "open exact", "open_n"),
    Column("bleu", "BLEU", "report_n", REPORTS, scale=1.0),
    Column("rouge_l", "ROUGE-L", "report_n", REPORTS),
    Column("attention_inside", "attention inside", "grounding_n", ATTENTION, chance="box_area", chance_label="area"),
    Column(
        "pointing_hits", "pointing hits", "pointing_n", ATTENTION, chance="pointing_chance", chance_label="random patch"
    ),
    Column(
        "asked_denser",
        "asked denser",
        "conditional_n",
        ASKED,
        chance="asked_denser_chance",
        chance_label="same map",
    ),
    Column(
        "asked_pointing",
        "asked pointing",
        "conditional_n",
        ASKED,
        chance="other_pointing",
        chance_label="other question",
    ),
    Column(
        "map_change",
        "map change",
        "conditional_n",
        ASKED,
        chance="map_change_same",
        chance_label="same boxes",
        better="",
    ),
)
# The rest is on the page only. A text table would be too wide with them.
FURTHER = (
    Column("false_yes_of_no", "false yes", "false_yes_n", better="lower"),
    Column("choice_accuracy", "multiple choice", "choice_n"),
    Column("bertscore_f1", "BERTScore", "report_n", REPORTS),
    Column("findings_f1_micro", "F1, micro", "findings_report_n", FINDINGS),
    Column("findings_f1_macro", "F1, macro", "findings_report_n", FINDINGS),
    Column("findings_hallucinated_of_asserted", "hallucinated", "findings_asserted_n", FINDINGS, better="lower"),
    Column("findings_missed_of_stated", "missed", "findings_stated_n", FINDINGS, better="lower"),
    Column("findings_wrong_side_of_sided", "wrong side", "findings_sided_n", FINDINGS, better="lower"),
    Column("findings_wrong_zone_of_zoned", "wrong zone", "findings_zoned_n", FINDINGS, better="lower"),
    Column("box_iou", "IoU", "grounding_n", ATTENTION, chance="box_iou_uniform", chance_label="uniform map"),
    Column(
        "box_ap", "average precision", "grounding_n", ATTENTION, chance="box_ap_uniform", chance_label="uniform map"
    ),
    *(
        Column(f"probes.{name}.accuracy_drop", label, f"probes.{name}.n", LOST, better="")
        for name, label in (
            (probes.BLANK, "blank image"),
            (probes.SHUFFLED, "shuffled image"),
            (probes.OTHER, "other image"),
            (probes.NO_IMAGE, "no image"),
            (probes.NO_QUESTION, "no question"),
            (probes.CAPTION, "report for image"),
        )
    ),
    *(
        Column(f"probes.{name}.accuracy", label, f"probes.{name}.n", STATED)
        for name, label in (
            (probes.PRESUPPOSED, "false premise denied"),
            (probes.RANDOM, "POPE, random"),
            (probes.POPULAR, "POPE, popular"),
            (probes.ADVERSARIAL, "POPE, adversarial"),
        )
    ),
)
# Computed from the predictions, which a text table does not read.
QUESTIONS = Column(
    "questions_correct",
    "questions correct",
    "questions_n",
    sentence="the share of correct answers",
    source=lambda evaluation: evaluation.questions,
)
PAGE_COLUMNS = (QUESTIONS, *COLUMNS, *FURTHER)
