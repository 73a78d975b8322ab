"""Means and ratios with a bootstrap interval."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

RESAMPLES = 1000


def mean(name: str, values: Sequence[float | bool], groups: Sequence[str] | None = None) -> dict[str, float]:
    """Return the mean of the values and the 2.5 and 97.5 % quantiles of its bootstrap, or nothing without values.

    The resampling uses a fixed seed, so the same predictions give the same interval.

    Args:
        name: key of the mean; the quantiles have the keys NAME_low and NAME_high.
        values: one value per sample.
        groups: the group of each sample, such as its image. Each group then counts once, with the mean of its samples,
            and groups are what is resampled. None if each sample is a group of its own.
    """
    if not values:
        return {}
    values_S = np.asarray(values, dtype=np.float64)
    if groups is not None:
        _, group_S = np.unique(np.asarray(groups), return_inverse=True)
        values_S = np.bincount(group_S, values_S) / np.bincount(group_S)
    draw = np.random.default_rng(0)
    means = [values_S[draw.integers(0, values_S.size, values_S.size)].mean() for _ in range(RESAMPLES)]
    low, high = np.quantile(means, [0.025, 0.975])
    return {name: float(values_S.mean()), f"{name}_low": float(low), f"{name}_high": float(high)}


def ratio(name: str, cases: Sequence[tuple[float, float]]) -> dict[str, float]:
    """Return the ratio of two sums and the quantiles of its bootstrap over units, or nothing if the second sum is 0.

    Args:
        name: key of the ratio; the quantiles have the keys NAME_low and NAME_high.
        cases: for each unit that is resampled as a whole, such as a report or an image, its part of both sums.
    """
    cases_U2 = np.asarray(cases, dtype=np.float64).reshape(-1, 2)
    above, below = cases_U2.sum(0)
    if not below:
        return {}
    units, draw = len(cases_U2), np.random.default_rng(0)
    sums_R2 = np.array([cases_U2[draw.integers(0, units, units)].sum(0) for _ in range(RESAMPLES)])
    drawn_R2 = sums_R2[sums_R2[:, 1] > 0]  # a resample without a case has no ratio
    low, high = np.quantile(drawn_R2[:, 0] / drawn_R2[:, 1], [0.025, 0.975])
    return {name: float(above / below), f"{name}_low": float(low), f"{name}_high": float(high)}
