"""Paired differences of every arm to the first one, with intervals and tests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from medalign.errors import ConfigError, DataError
from medalign.evaluation.comparison.arms import Arm, Seed, clusters, require_same_samples
from medalign.evaluation.comparison.measures import MEASURES, Measure
from medalign.evaluation.comparison.resampling import (
    cluster_bootstrap,
    cluster_permutation,
    holm,
    mcnemar,
    seed_interval,
    sign_flip,
)
from medalign.evaluation.metrics import Prediction

Pairs = list[tuple[Prediction, Prediction]]


@dataclass(frozen=True)
class Comparison:
    """The difference of one score between an arm and the baseline.

    Attributes:
        metric: a key of MEASURES. Scores are fractions, BLEU is in points.
        unit: what is resampled: "image", "patient", "key", or "seed" for arms of several seeds.
        p: of the permutation test by cluster; of the paired t-test for seeds.
        p_holm: p, adjusted for all comparisons of one call.
        p_sign_flip: for seeds, of the test that flips the signs of their differences.
        only_baseline: for scores of right and wrong, the samples that only the baseline has right; McNemar's counts.
    """

    metric: str
    baseline: str
    arm: str
    samples: int
    unit: str
    units: int
    baseline_score: float
    arm_score: float
    difference: float
    low: float
    high: float
    p: float
    p_holm: float = float("nan")
    p_sign_flip: float | None = None
    only_baseline: int | None = None
    only_arm: int | None = None
    p_mcnemar: float | None = None

    def as_data(self) -> dict[str, Any]:
        """Return the fields that apply."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def compare(arms: Sequence[Arm], by: str = "image", metrics: Sequence[str] | None = None) -> list[Comparison]:
    """Compare every arm with the first one.

    Arms of one seed are compared sample by sample: the interval resamples clusters, and the test swaps them. For arms
    of several seeds, the seed is the unit: a difference per seed, with the t-interval of their mean.

    Args:
        arms: at least two, all with as many seeds.
        by: what makes samples dependent: "image", "patient", or "key" for independent samples.
        metrics: keys of MEASURES; by default all that have samples.

    Raises:
        ConfigError: there are not two arms with different names, or they differ in the number of seeds.
        DataError: the arms were not measured on the same samples, a score has none, or a cluster is not known.
    """
    if len(arms) < 2:
        raise ConfigError("a comparison needs at least two arms")
    if len({arm.name for arm in arms}) < len(arms):
        raise ConfigError(f"arms must have different names: {', '.join(arm.name for arm in arms)}; write NAME=PATH")
    baseline, *others = arms
    found = []
    for arm in others:
        require_same_samples(baseline, arm)
        for metric in MEASURES if metrics is None else metrics:
            pairs = [_pairs(*seeds, MEASURES[metric]) for seeds in zip(baseline.seeds, arm.seeds, strict=True)]
            if all(pairs):
                found.append(_compare(metric, baseline, arm, pairs, by))
            elif metrics is not None or any(pairs):
                raise DataError(f"{metric} has no sample in every file of {baseline.name} and {arm.name}; leave it out")
    if not found:
        raise DataError("the arms have no score in common")
    adjusted = holm([one.p for one in found])
    return [replace(one, p_holm=p) for one, p in zip(found, adjusted, strict=True)]


def _pairs(one: Seed, other: Seed, measure: Measure) -> Pairs:
    pairs = [(row, other[place]) for place, row in one.items()]
    return [pair for pair in pairs if all(map(measure.applies, pair))]


def _compare(metric: str, baseline: Arm, arm: Arm, pairs: list[Pairs], by: str) -> Comparison:
    measure = MEASURES[metric]
    scores = np.array([_scores(one, measure) for one in pairs])
    difference = float((scores[:, 1] - scores[:, 0]).mean())
    common: dict[str, Any] = {
        "metric": metric,
        "baseline": baseline.name,
        "arm": arm.name,
        "samples": sum(map(len, pairs)),
        "baseline_score": float(scores[:, 0].mean()),
        "arm_score": float(scores[:, 1].mean()),
        "difference": difference,
    }
    if len(pairs) > 1:
        differences_N = (scores[:, 1] - scores[:, 0]).tolist()
        low, high, p = seed_interval(differences_N)
        flip = sign_flip(differences_N)
        return Comparison(**common, unit="seed", units=len(pairs), low=low, high=high, p=p, p_sign_flip=flip)
    names = clusters(pairs[0], by, (baseline.paths[0], arm.paths[0]))
    return Comparison(**common, unit=by, units=len(set(names)), **_by_cluster(pairs[0], names, measure))


def _scores(pairs: Pairs, measure: Measure) -> tuple[float, float]:
    rows, twins = zip(*pairs, strict=True)
    score = measure.score(rows)
    first, second = score(np.stack([measure.statistics(rows).sum(0), measure.statistics(twins).sum(0)]))
    return float(first), float(second)


def _by_cluster(pairs: Pairs, names: list[str], measure: Measure) -> dict[str, Any]:
    rows, twins = zip(*pairs, strict=True)
    _, owners = np.unique(names, return_inverse=True)
    a_SK, b_SK = measure.statistics(rows), measure.statistics(twins)
    a_CK, b_CK = np.zeros((owners.max() + 1, a_SK.shape[1])), np.zeros((owners.max() + 1, a_SK.shape[1]))
    np.add.at(a_CK, owners, a_SK)
    np.add.at(b_CK, owners, b_SK)
    score = measure.score(rows)
    low, high = cluster_bootstrap(a_CK, b_CK, score)
    values: dict[str, Any] = {"low": low, "high": high, "p": cluster_permutation(a_CK, b_CK, score)}
    if measure.binary:
        counts = mcnemar(a_SK[:, 0].tolist(), b_SK[:, 0].tolist())
        values |= dict(zip(("only_baseline", "only_arm", "p_mcnemar"), counts, strict=True))
    return values


def as_data(arms: Sequence[Arm], found: Sequence[Comparison]) -> dict[str, Any]:
    """Return the arms and their comparisons for JSON."""
    files = {arm.name: [str(Path(path)) for path in arm.paths] for arm in arms}
    return {"arms": files, "comparisons": [one.as_data() for one in found]}
