"""Writes the tables of the results page from the result files."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from medalign.errors import DataError
from tools.study import text_tuning
from tools.study.analysis import Result, check, complete, contrasts, of_arm, seeds_of
from tools.study.arms import ARMS, BASE, FIRST_SEED, RATES, SMALLER, trials
from tools.study.results_file import COMMONEST, PRIMARY

PAGE = Path(__file__).resolve().parents[2] / "docs/results/study.md"
BEGIN, END = "<!-- study: tables -->", "<!-- study: end -->"
NOT_YET = "not yet run"
SECONDARY = {
    "closed_accuracy": "closed",
    "open_exact": "open exact",
    "bleu": "BLEU-4",
    "rouge_l": "ROUGE-L",
    "false_yes": "false yes",
    "attention_inside": "attention inside",
    "pointing_hits": "pointing",
}
PROBED = {"blank_film": "on a blank film", "other_film": "on another film"}
CONDITIONAL = {
    "asked_denser": "asked denser (50)",
    "asked_pointing": "points at the asked",
    "other_pointing": "points at the other",
    "map_change": "map change",
    "map_change_same": "change, same boxes",
}
POINTS = ("bleu",)  # from 0 to 100 already; all others are shares


def write_page(results: Mapping[str, Result], page: Path = PAGE) -> None:
    """Replace the tables of the page.

    Raises:
        DataError: the page has no place for them, or the results are not comparable.
    """
    text = page.read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise DataError(f"{page} does not contain {BEGIN} and {END}; put them where the tables belong")
    page.write_text(f"{before}{BEGIN}\n\n{tables(results)}\n\n{END}{after}", encoding="utf-8")


def tables(results: Mapping[str, Result]) -> str:
    """Return all tables. Raises DataError if the results are not comparable."""
    check(results)
    parts = [
        "### Contrasts of all questions",
        _contrasts(results),
        "### Arms",
        _arms(results),
        "### Secondary measures",
        _secondary(results, SECONDARY),
        "### Attention that follows the question",
        _secondary(results, CONDITIONAL),
        "### Test questions on other films",
        _secondary(results, {PRIMARY: "on their film", **PROBED}),
        "### Smaller training sets",
        _sizes(results),
        "### Trials",
        _trials(results),
        "### Choice of the targets of arm T",
        _targets(),
        "### Provenance",
        _provenance(results),
    ]
    return "\n\n".join(parts)


def _contrasts(results: Mapping[str, Result]) -> str:
    rows = []
    for name, found in contrasts(results).items():
        if found is None:
            rows.append([name, NOT_YET, "", "", "", "", ""])
            continue
        strong = "**" if found.p_holm < 0.05 else ""
        rows.append(
            [
                name,
                f"{strong}{100 * found.mean:+.1f}{strong}",
                f"{100 * found.low:+.1f} to {100 * found.high:+.1f}",
                ", ".join(f"{100 * value:+.1f}" for value in found.values),
                _p(found.p),
                _p(found.p_sign_flip),
                _p(found.p_holm),
            ]
        )
    return _table(["points", "mean", "95 % interval", "each seed", "p", "p (sign flip)", "p (Holm, 6)"], rows)


def _arms(results: Mapping[str, Result]) -> str:
    rows = []
    for arm, facts in ARMS.items():
        done = len(of_arm(results, arm).keys() & set(seeds_of([arm])))
        shown = NOT_YET if not complete(results, arm) else _spread(_values(results, arm, PRIMARY), PRIMARY)
        rows.append([arm, facts.title, f"{done} of {facts.seeds}", shown])
    base = of_arm(results, BASE).get(FIRST_SEED)
    before = {PRIMARY: None, COMMONEST: None} if base is None else base["scores"] | {COMMONEST: base.get(COMMONEST)}
    rows.append(["base", "before training", "", _shown(before[PRIMARY], PRIMARY)])
    rows.append(["", "most common training answer", "", _shown(before[COMMONEST], COMMONEST)])
    return _table(["arm", "", "runs", "questions correct"], rows)


def _secondary(results: Mapping[str, Result], names: Mapping[str, str]) -> str:
    rows = [
        [arm, *(_spread(_values(results, arm, name), name) for name in names)] for arm in ARMS if complete(results, arm)
    ]
    if base := of_arm(results, BASE).get(FIRST_SEED):
        rows.append(["base", *(_shown(base["scores"].get(name), name) for name in names)])
    return _table(["arm", *names.values()], rows) if rows else NOT_YET


def _sizes(results: Mapping[str, Result]) -> str:
    rows = []
    for films in SMALLER:
        found = {arm: of_arm(results, arm, films) for arm in ("L", "B")}
        if all(len(seeds) == 3 for seeds in found.values()):
            cells = [_spread([one["scores"][PRIMARY] for one in seeds.values()], PRIMARY) for seeds in found.values()]
            rows.append([f"{films:,}", *cells])
        else:
            rows.append([f"{films:,}", NOT_YET, NOT_YET])
    return _table(["films", "L", "B"], rows)


def _trials(results: Mapping[str, Result]) -> str:
    rows = []
    for arm in ARMS:
        scores = [results[one.name]["scores"][PRIMARY] if one.name in results else None for one in trials(arm)]
        rows.append([arm, *(NOT_YET if score is None else _shown(score, PRIMARY) for score in scores)])
    return _table(["development set", *(f"peak learning rate {rate:g}" for rate in RATES)], rows)


def _targets() -> str:
    """Return the candidates of arm T beside the trial of B, on the development set."""
    if not text_tuning.RESULT.is_file():
        return NOT_YET
    found = json.loads(text_tuning.RESULT.read_text(encoding="utf-8"))
    rows = {"B, the class token": found["reference"], **found["candidates"]}
    names = {PRIMARY: "questions correct", **{key: (SECONDARY | CONDITIONAL)[key] for key in text_tuning.SCORES[1:]}}
    cells = []
    for title, scores in rows.items():
        strong = "**" if title == found["chosen"] else ""
        cells.append([f"{strong}{title}{strong}", *(_shown(scores[key], key) for key in names)])
    return _table(["text-conditioned share", *names.values()], cells)


def _provenance(results: Mapping[str, Result]) -> str:
    if not results:
        return NOT_YET
    facts = {
        "commit of the code that trained": {one["commit"] for one in results.values()},
        "test questions": {str(one["questions"]) for one in results.values() if not one["trial"]},
        "digest of the packaged student": {one["student"] for one in results.values()},
        "digest of the packaged teacher": {one["teacher"] for one in results.values()},
        "versions": {", ".join(f"{k} {v}" for k, v in one["versions"].items()) for one in results.values()},
        "steps that updated nothing": {str(sum(one["diverged_steps"] for one in results.values()))},
    }
    return _table(["", ""], [[name, "; ".join(sorted(values))] for name, values in facts.items()])


def _values(results: Mapping[str, Result], arm: str, name: str) -> list[float | None]:
    return [one["scores"].get(name) for one in of_arm(results, arm).values()]


def _spread(found: Sequence[float | None], name: str) -> str:
    values = [value for value in found if value is not None]
    if len(values) < len(found):
        return NOT_YET
    return f"{_shown(statistics.mean(values), name)} ± {_shown(statistics.stdev(values), name)}"


def _shown(value: float | None, name: str) -> str:
    return NOT_YET if value is None else f"{value if name in POINTS else 100 * value:.1f}"


def _p(value: float) -> str:
    return "<0.001" if value < 0.001 else f"{value:.3f}"


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
