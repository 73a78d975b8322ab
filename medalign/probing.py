"""Asks the probes of an evaluation: on any number of ranks, resumable, as the evaluation itself.

The plan of a probe depends only on the evaluation's answers and the shards. Rank 0 makes it for all ranks.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch.distributed as dist

from medalign import distributed
from medalign.answering import Found, Work, answer_all
from medalign.data.shards.index import ShardIndex
from medalign.evaluation.generation import PredictionBatch
from medalign.evaluation.metrics import Prediction, read_predictions, write_predictions
from medalign.evaluation.probes.catalog import CHANGED
from medalign.evaluation.probes.plan import Plan, Planner, plan_of
from medalign.evaluation.probes.samples import ProbeSamples
from medalign.evaluation.scores_file import read_scores, record_probe, rescore
from medalign.geometry import PatchGrid
from medalign.run_folder import EvaluationFolder

log = logging.getLogger("medalign")


@dataclass(frozen=True)
class Asking:
    """How the questions of an evaluation were asked.

    Attributes:
        work: the samples, of ShardIndex folders.
        indexes: the same folders.
        settings: all that determined the answers.
        ask: answers a batch.
        grid: the student's grid.
        store: of all ranks.
    """

    work: Work
    indexes: Sequence[ShardIndex]
    settings: Mapping[str, Any]
    ask: Callable[[Found], PredictionBatch]
    grid: PatchGrid
    store: dist.Store


def ask_probes(folder: EvaluationFolder, names: Sequence[str], asking: Asking, more: bool = False) -> None:
    """Ask probes about a finished evaluation, and add them to its files. Every rank must call it.

    Args:
        folder: of the evaluation.
        names: of the probes. One that was asked for this evaluation is not asked again.
        asking: how the questions are asked.
        more: whether other work follows.

    Raises:
        DataError: too many samples cannot be read.
        Stopped: a signal ended it on all ranks; the same call resumes it.
    """
    plans = _plans(folder, names, asking) if names else {}
    for name, plan in plans.items():
        following = more or name != list(plans)[-1]
        left_out = "".join(f"; {count} {reason}" for reason, count in plan.not_asked.items())
        if distributed.is_main():
            log.info("probe %s: %d questions%s", name, plan.asked, f" (left out: {left_out[2:]})" if left_out else "")
        if plan.asked:
            _answer(folder, name, plan, asking, following)
        else:
            _record(folder, name, plan, unreadable=0)
    if plans:
        with distributed.raise_on_all_ranks():
            if distributed.is_main():
                rescore(folder.predictions)


def remove_probes(folder: EvaluationFolder) -> None:
    """Remove the probes of an evaluation whose answers are about to be replaced. Only rank 0 calls it."""
    paths = folder.probes()
    if paths:
        log.info("%s: removing its %d probes, which belong to the answers that are replaced", folder.path, len(paths))
    for path in paths:
        path.unlink()


def _plans(folder: EvaluationFolder, names: Sequence[str], asking: Asking) -> dict[str, Plan]:
    """Return the plan of each probe that is left to ask, on all ranks."""
    found: dict[str, Any] = {}
    with distributed.raise_on_all_ranks():
        if distributed.is_main():
            asked = read_scores(folder.scores).get("probes", {})
            done = [name for name, scores in asked.items() if folder.probe(name).is_file() or not scores.get("n")]
            for name in [name for name in names if name in done]:
                log.info("probe %s of %s is already asked; --overwrite repeats it", name, folder.path)
            if left := [name for name in names if name not in done]:
                planner = Planner(asking.indexes, asking.work.planned, read_predictions(folder.predictions))
                found = {name: asdict(planner.plan(name)) for name in left}
    sent = json.loads(distributed.broadcast_from_main(json.dumps(found)))
    return {name: plan_of(values) for name, values in sent.items()}


def _answer(folder: EvaluationFolder, name: str, plan: Plan, asking: Asking, more: bool) -> None:
    samples = [
        ProbeSamples(name, entries, number, asking.indexes, asking.grid) for number, entries in enumerate(plan.folders)
    ]
    planned = [len(each) for each in samples]
    work = replace(asking.work, name=f"probe {name}", folders=samples, planned=planned, more=more)
    settings = {**asking.settings, "probe": name, "questions": plan.digest}
    tally, journal = answer_all(work, folder.probe(name), settings, asking.ask, asking.store)
    with distributed.raise_on_all_ranks():
        if distributed.is_main():
            tally.warn(asking.settings["max_length"], asking.settings["max_new_tokens"])
            if name in CHANGED:
                _name_true_images(tally.rows, read_predictions(folder.predictions))
            write_predictions(folder.probe(name), tally.rows)
            _record(folder, name, plan, tally.unreadable)
            journal.finish()


def _name_true_images(rows: Sequence[Prediction], real: Sequence[Prediction]) -> None:
    """Give answers the image that their question is about: comparisons resample it, whatever was shown."""
    images = {(row.folder, row.key): row.image for row in real}
    for row in rows:
        row.image = images[row.folder, row.key]


def _record(folder: EvaluationFolder, name: str, plan: Plan, unreadable: int) -> None:
    if distributed.is_main():
        record_probe(folder, name, {"unreadable": unreadable, "not_asked": plan.not_asked})
