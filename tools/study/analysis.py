"""The registered analysis: contrasts with the seed as the unit, computed from complete arms only."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from medalign.errors import DataError
from medalign.evaluation.comparison.resampling import holm, seed_interval, sign_flip
from tools.study.arms import ARMS, FILMS, FIRST_SEED
from tools.study.results_file import PRIMARY

Result = Mapping[str, Any]
EQUAL = ("student", "teacher", "keys", "questions")  # of all runs that are scored on the test set
CONTRASTS: dict[str, dict[str, float]] = {
    "B - L": {"B": 1, "L": -1},
    "B - U": {"B": 1, "U": -1},
    "main effect of L_vis": {"V": 0.5, "L": -0.5, "B": 0.5, "A": -0.5},
    "main effect of L_att": {"A": 0.5, "L": -0.5, "B": 0.5, "V": -0.5},
    "T - B": {"T": 1, "B": -1},
    "X - B": {"X": 1, "B": -1},
}


@dataclass(frozen=True)
class Contrast:
    """One registered contrast of the primary metric, as fractions.

    Attributes:
        name: a key of CONTRASTS.
        values: one per seed.
        low: lower end of the 95 % t-interval of their mean.
        high: its upper end.
        p: of the paired t-test.
        p_sign_flip: of the test that flips the signs of the values.
        p_holm: p, adjusted for all contrasts of CONTRASTS.
    """

    name: str
    values: tuple[float, ...]
    low: float
    high: float
    p: float
    p_sign_flip: float
    p_holm: float = float("nan")

    @property
    def mean(self) -> float:
        """The mean over the seeds."""
        return statistics.mean(self.values)


def of_arm(results: Mapping[str, Result], arm: str, films: int = FILMS) -> dict[int, Result]:
    """Return the results of an arm by seed, without its trials."""
    found = [one for one in results.values() if one["arm"] == arm and not one["trial"] and one["films"] == films]
    return {one["seed"]: one for one in sorted(found, key=lambda one: one["seed"])}


def seeds_of(arms: Sequence[str]) -> list[int]:
    """Return the registered seeds that all these arms have."""
    return [FIRST_SEED + place for place in range(min(ARMS[arm].seeds for arm in arms))]


def complete(results: Mapping[str, Result], arm: str) -> bool:
    """Return whether all registered seeds of an arm are finished."""
    return of_arm(results, arm).keys() >= set(seeds_of([arm]))


def contrasts(results: Mapping[str, Result]) -> dict[str, Contrast | None]:
    """Return each registered contrast, or None if not all of its runs are finished.

    Holm's adjustment is for all registered contrasts: one that is not finished counts as p = 1.
    """
    found = {name: _contrast(name, weights, results) for name, weights in CONTRASTS.items()}
    adjusted = holm([1.0 if one is None else one.p for one in found.values()])
    return {
        name: None if one is None else replace(one, p_holm=p)
        for (name, one), p in zip(found.items(), adjusted, strict=True)
    }


def _contrast(name: str, weights: Mapping[str, float], results: Mapping[str, Result]) -> Contrast | None:
    arms = {arm: of_arm(results, arm) for arm in weights}
    seeds = seeds_of(list(weights))
    if any(seed not in arms[arm] for arm in weights for seed in seeds):
        return None
    values = tuple(
        sum(weight * arms[arm][seed]["scores"][PRIMARY] for arm, weight in weights.items()) for seed in seeds
    )
    low, high, p = seed_interval(values)
    return Contrast(name, values, low, high, p, sign_flip(values))


def check(results: Mapping[str, Result]) -> None:
    """Check what must be equal for the comparison to be fair.

    Raises:
        DataError: runs differ in the student, the teacher or the test questions, runs of an arm differ in a setting,
            or two seeds gave the same student.
    """
    scored = {name: one for name, one in results.items() if not one["trial"]}
    for key in EQUAL:
        _require_one_value({name: one[key] for name, one in scored.items()}, key)
    for arm in ARMS:
        for films in {one["films"] for one in scored.values()}:
            found = {f"{arm}-{films}-{seed}": one for seed, one in of_arm(results, arm, films).items()}
            _require_one_value({name: one["settings"] for name, one in found.items()}, "settings")
    owner: dict[str, str] = {}
    for name, one in results.items():
        weights = str(sorted(one["weights"].items()))
        if weights in owner:
            raise DataError(f"{name} and {owner[weights]} have the same weights; run one of them again")
        owner[weights] = name


def _require_one_value(values: Mapping[str, Any], key: str) -> None:
    if len(set(values.values())) > 1:
        name, other = next((a, b) for a in values for b in values if values[a] != values[b])
        raise DataError(
            f"{key} differs: {name} has {values[name]} and {other} has {values[other]}; run them again with equal code"
        )
