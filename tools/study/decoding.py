"""Decoding methods with their published settings on finished runs: the scores beside those of greedy decoding.

    python -m tools.study.decoding --runs "{base: runs/base, L: [runs/L-10, runs/L-11]}" --data data/val --limit 200 \
        --output decoding.json

Writes, for each arm and method, the scores and their paired differences to greedy decoding, with p adjusted by Holm for
all methods and scores of the arm. For an arm of one run, the 95 % intervals are of a bootstrap over films and p of a
permutation test; for several, one per seed, the seed is the unit, as in `medalign compare`. Scores without tests are
means of the runs. What a method has learned of a student, such as the heads of CAI, is listed for each run. The answers
are evaluations of the runs, so a call that ends early resumes; only beam search, the nucleus and Med-VCD in the form of
its authors' scripts, which are short, are repeated. Prints all as tables.
"""

from __future__ import annotations

import json
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

from jsonargparse import auto_cli

from medalign.decoding.base import Decoding
from medalign.decoding.methods.medvcd import MedVCD
from medalign.decoding.registry import METHODS, find_method
from medalign.evaluation.comparison.arms import read_arm
from medalign.evaluation.comparison.compare import compare
from medalign.evaluation.comparison.measures import MEASURES
from medalign.evaluation.probes.catalog import PROBES
from medalign.evaluation.scores_file import read_rows, read_scores
from medalign.evaluator import evaluate_each
from medalign.run_folder import EvaluationFolder
from tools.study.results_file import false_yes

TESTED = {
    "questions_correct": "questions correct",
    "closed_accuracy": "closed questions",
    "open_exact": "open questions, exact",
    "bleu": "BLEU of reports",
}
FORMS = {  # of greedy decoding; Med-VCD as its authors' scripts run it
    "beams": Decoding(num_beams=5),
    "nucleus": Decoding(do_sample=True, top_p=0.9),
    "medvcd-scripts": Decoding(method=MedVCD(alpha=1.1, beta=0.1, sentence=16)),
}
FALSE_YES = "false_yes"
DESCRIBED = {  # without tests
    FALSE_YES: "yes where no is right",
    "asked_denser": "asked finding denser",
    "attention_inside": "attention inside",
    "pointing_hits": "pointing",
}
SIGNIFICANT = 0.05
KEPT = ("metric", "unit", "samples", "baseline_score", "arm_score", "difference", "low", "high", "p", "p_holm")


def main(
    runs: dict[str, Path | list[Path]],
    data: Path,
    output: Path,
    methods: list[str] | None = None,
    limit: int | None = None,
    name: str = "decoding",
    batch_size: int = 32,
    max_new_tokens: int = 128,
    probes: list[str] | None = None,
    settings: dict[str, dict[str, Any]] | None = None,
) -> None:
    """Evaluate runs with several methods and write the comparison.

    Args:
        runs: for each arm the folder of a run, or those of one run per seed.
        data: folder of shards.
        output: JSON file to write.
        methods: all packaged methods and the further forms by default; greedy is always among them.
        limit: only the first samples.
        name: name of the evaluations in the runs.
        batch_size: questions per batch.
        max_new_tokens: most tokens of an answer.
        probes: asked after the answers, as by `medalign evaluate`; their accuracy is among the scores without tests.
        settings: of methods, in place of the published ones; `cai` needs its shards, `{cai: {shards: data/train}}`.
    """
    chosen = ["greedy", *(other for other in methods or [*FORMS, *METHODS] if other != "greedy")]
    decodings = {method: _decoding(method, max_new_tokens, (settings or {}).get(method, {})) for method in chosen}
    result: dict[str, Any] = {
        "command": shlex.join(["python", "-m", "tools.study.decoding", *sys.argv[1:]]),
        "settings": {method: decoding.describe() for method, decoding in decodings.items()},
        "runs": {},
        "described": {},
        "learned": {},
    }
    options = {"batch_size": batch_size, "limit": limit, "probes": probes or []}
    for arm, places in runs.items():
        seeds = places if isinstance(places, list) else [places]
        folders = [_answers(run, data, decodings, name, options) for run in seeds]
        of_method = {method: tuple(found[method] for found in folders) for method in chosen}
        arms = [read_arm(f"{method}={','.join(map(str, paths))}") for method, paths in of_method.items()]
        rows: dict[str, list[dict[str, Any]]] = {}
        rows_of_greedy = arms[0].seeds[0].values()
        metrics = [metric for metric in TESTED if any(map(MEASURES[metric].applies, rows_of_greedy))]
        for one in compare(arms, metrics=metrics):
            found = one.as_data()
            rows.setdefault(one.arm, []).append({key: found[key] for key in KEPT})
        described = {method: _described(paths) for method, paths in of_method.items()}
        result["runs"][arm] = rows
        result["described"][arm] = described
        result["learned"][arm] = _learned(of_method, result["settings"])
        output.write_text(json.dumps(result, indent=2) + "\n")
    sys.stdout.write(tables(result))


def _decoding(method: str, max_new_tokens: int, settings: dict[str, Any]) -> Decoding:
    if method in FORMS:
        return replace(FORMS[method], max_new_tokens=max_new_tokens)
    return Decoding(method=find_method(method)(**settings), max_new_tokens=max_new_tokens)


def _answers(
    run: Path, data: Path, decodings: dict[str, Decoding], name: str, options: dict[str, Any]
) -> dict[str, Path]:
    """Evaluate a run with all methods. Returns the folder of each evaluation."""
    fixed: dict[str, Any] = {"max_length": None, "max_skip_fraction": 0.0, "base": None, "overwrite": False}
    methods = [method for method in decodings if method not in FORMS]
    together = {name: methods} | {f"{name}-{form}": [form] for form in decodings if form in FORMS}
    found: dict[str, Path] = {}
    for each, chosen in together.items():
        asked = [decodings[method] for method in chosen]
        folders = evaluate_each(run, [str(data)], asked, name=each, **fixed, **options)
        found |= dict(zip(chosen, folders, strict=True))
    return found


def _described(folders: tuple[Path, ...]) -> dict[str, float]:
    """Return the means over runs of the scores without tests."""
    homes = [EvaluationFolder(folder) for folder in folders]
    found = [read_scores(home.scores) for home in homes]
    means = {key: fmean(one[key] for one in found) for key in DESCRIBED if all(key in one for one in found)}
    for probe in PROBES:
        asked = [one["probes"][probe] for one in found if one.get("probes", {}).get(probe, {}).get("n")]
        if len(asked) == len(found):
            means[probe] = fmean(scores["accuracy"] for scores in asked)
    return means | {FALSE_YES: fmean(false_yes(read_rows(home.predictions)) for home in homes)}


def _learned(folders: dict[str, tuple[Path, ...]], settings: dict[str, Any]) -> dict[str, Any]:
    """Return what methods have learned of the student of each run, such as the heads of CAI."""
    found: dict[str, list[dict[str, Any]]] = {}
    for method, paths in folders.items():
        runs = [read_scores(EvaluationFolder(path).scores).get("provenance", {}).get("settings", {}) for path in paths]
        new = [
            {key: run[key] for key in run if key.startswith("decoding.") and key not in settings[method]}
            for run in runs
        ]
        if any(new):
            found[method] = new
    return found


def tables(result: dict[str, Any]) -> str:
    """Return the differences and the scores without tests as tables of Markdown, in points; bold: p below 0.05."""
    labels = DESCRIBED | {probe: f"accuracy under {probe}" for probe in PROBES}
    differences = [_differences(result["runs"], *one) for one in TESTED.items()]
    scores = [_scores(result["described"], *one) for one in labels.items()]
    return "\n".join(table for table in (*differences, *scores) if table)


def _differences(runs: dict[str, Any], metric: str, label: str) -> str:
    """Return the table of one score: a row for each method, a column for each arm; empty if no sample has the score."""
    factor, columns = MEASURES[metric].scale, {}
    for arm, rows in runs.items():
        found = {method: one for method, ones in rows.items() for one in ones if one["metric"] == metric}
        if found:
            greedy = next(iter(found.values()))["baseline_score"] * factor
            columns[f"{arm} (greedy {greedy:.1f})"] = {name: _shown(one, factor) for name, one in found.items()}
    return _markdown(label, columns)


def _shown(one: dict[str, Any], factor: float) -> str:
    mark = "**" if one["p_holm"] < SIGNIFICANT else ""
    difference, low, high = (one[key] * factor for key in ("difference", "low", "high"))
    return f"{mark}{difference:+.1f}{mark} [{low:+.1f}, {high:+.1f}]"


def _scores(described: dict[str, Any], score: str, label: str) -> str:
    """Return the table of a score without tests, in which greedy decoding has a row."""
    columns = {
        arm: {method: f"{100 * one[score]:.1f}" for method, one in found.items() if score in one}
        for arm, found in described.items()
    }
    return _markdown(label, {arm: values for arm, values in columns.items() if values})


def _markdown(label: str, columns: dict[str, dict[str, str]]) -> str:
    if not columns:
        return ""
    methods = list(dict.fromkeys(method for values in columns.values() for method in values))
    rows = [[f"`{method}`", *(values.get(method, "") for values in columns.values())] for method in methods]
    lines = [[label, *columns], ["---"] * (len(columns) + 1), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
