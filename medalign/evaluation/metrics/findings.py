"""Scores of the findings that reports state, read by the rules of `evaluation.findings` (chest reports in English).

| key | meaning | of |
| --- | --- | --- |
| findings_report_n | reports | reports |
| findings_reference_n | reports whose reference names a finding or a normal chest | reports |
| findings_f1_micro, findings_f1_macro | F1 of present findings | 14 findings |
| findings_chexpert14_f1_micro, ..._macro | the same; No Finding included | CheXpert's 14 observations |
| findings_chexpert5_f1_micro, ..._macro | the same | the five in CHEXPERT5 |
| findings_hallucinated_of_asserted | the reference does not state it | findings_asserted_n of predictions |
| findings_contradicted_of_asserted | the reference denies it | the same |
| findings_missed_of_stated | the prediction does not state it | findings_stated_n of references |
| findings_wrong_side_of_sided | the prediction names a side that the reference does not | findings_sided_n |
| findings_wrong_zone_of_zoned | the prediction names a zone that the reference does not | findings_zoned_n |
| findings_hallucinating_of_reports | reports that state a hallucinated finding | findings_report_n |
| findings_by | how often references and predictions state it, and both | each finding |

The number of cases of a rate has the name of the rate without its denominator, such as findings_missed_n. Sided and
zoned are the findings that both texts state, each with a side or a zone. A finding that the reference doubts is left
out of its report, so it is neither hallucinated nor missed. To doubt a finding is not to state it. A macro F1 is the
mean over the findings that any reference states (NAME_macro_n). Rates and micro F1 have a 95 % bootstrap interval over
reports. Without a case, a rate is omitted. findings_signature names the lexicon and the rules.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from medalign.evaluation.findings import Label, Labeler, Reading, chest_labeler
from medalign.evaluation.metrics.intervals import ratio
from medalign.evaluation.metrics.predictions import Prediction

CHEXPERT5 = {"Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Pleural Effusion"}
Labels = tuple[Mapping[str, Label], Mapping[str, Label]]  # of a prediction and its reference
Stated = tuple[set[str], set[str]]  # what a prediction and its reference state, without what the reference doubts
Cases = dict[str, list[tuple[int, int]]]  # rate -> per report, the cases that count against it and all cases


def findings_scores(reports: Sequence[Prediction]) -> dict[str, Any]:
    """Compute the scores of the table above. Without reports there is none."""
    if not reports:
        return {}
    labeler = chest_labeler()
    read = [(labeler.read(row.prediction), labeler.read(row.answer)) for row in reports]
    pairs = [(given.labels, expected.labels) for given, expected in read]
    named = sum(bool(expected.labels) or expected.normal for _, expected in read)
    scores: dict[str, Any] = {"findings_report_n": len(reports), "findings_reference_n": named}
    scores |= _agreement("findings", [_stated(*pair) for pair in pairs]) | _categories(labeler, read)
    for name, cases in _cases(pairs).items():
        of = name.rpartition("_of_")[2]
        scores |= {f"findings_{name.partition('_of_')[0]}_n": sum(bad for bad, _ in cases)}
        scores |= {f"findings_{of}_n": sum(count for _, count in cases)} if of != "reports" else {}
        scores |= ratio(f"findings_{name}", cases)
    return scores | {"findings_by": _by(pairs), "findings_signature": labeler.signature}


def _stated(given: Mapping[str, Label], expected: Mapping[str, Label]) -> Stated:
    assertions = [{name: label.assertion for name, label in labels.items()} for labels in (given, expected)]
    return _named(assertions[0], "present") - _named(assertions[1], "uncertain"), _named(assertions[1], "present")


def _categories(labeler: Labeler, read: Sequence[tuple[Reading, Reading]]) -> dict[str, Any]:
    """Return the F1 of CheXpert's observations."""
    found: list[Stated] = []
    for texts in read:
        given, expected = map(labeler.categories, texts)
        doubted = _named(expected, "uncertain")
        found.append((_named(given, "present") - doubted, _named(expected, "present")))
    five = [(given & CHEXPERT5, expected & CHEXPERT5) for given, expected in found]
    return _agreement("findings_chexpert14", found) | _agreement("findings_chexpert5", five)


def _named(labels: Mapping[str, str], assertion: str) -> set[str]:
    return {name for name, value in labels.items() if value == assertion}


def _agreement(name: str, pairs: Sequence[Stated]) -> dict[str, Any]:
    """Return micro and macro F1 of the findings that predictions and references state."""
    micro = [(2 * len(given & expected), len(given) + len(expected)) for given, expected in pairs]
    counts: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for given, expected in pairs:
        for finding in given | expected:
            counts[finding].update(given=finding in given, true=finding in expected, both=finding in given & expected)
    each = [2 * one["both"] / (one["given"] + one["true"]) for one in counts.values() if one["true"]]
    macro = {f"{name}_f1_macro": sum(each) / len(each)} if each else {}
    return {**ratio(f"{name}_f1_micro", micro), **macro, f"{name}_macro_n": len(each)}


def _cases(pairs: Sequence[Labels]) -> Cases:
    cases: Cases = defaultdict(list)
    for given, expected in pairs:
        asserted, stated = _stated(given, expected)
        wrong = asserted - stated
        denied = [name for name in wrong if name in expected]  # what is doubted is left out before
        both = [(given[name], expected[name]) for name in asserted & stated]
        cases["hallucinated_of_asserted"].append((len(wrong), len(asserted)))
        cases["contradicted_of_asserted"].append((len(denied), len(asserted)))
        cases["missed_of_stated"].append((len(stated - asserted), len(stated)))
        sides = [(one.sides, other.sides) for one, other in both if one.sides and other.sides]
        zones = [(one.zones, other.zones) for one, other in both if one.zones and other.zones]
        cases["wrong_side_of_sided"].append((sum(not one <= other for one, other in sides), len(sides)))
        cases["wrong_zone_of_zoned"].append((sum(not one <= other for one, other in zones), len(zones)))
        cases["hallucinating_of_reports"].append((int(bool(wrong)), 1))
    return cases


def _by(pairs: Sequence[Labels]) -> dict[str, dict[str, int]]:
    stated = [_stated(*pair) for pair in pairs]
    names = {name for both in stated for names in both for name in names}
    return {
        name: {
            "stated_n": sum(name in expected for _, expected in stated),
            "asserted_n": sum(name in given for given, _ in stated),
            "both_n": sum(name in given & expected for given, expected in stated),
        }
        for name in sorted(names)
    }
