"""Means with a bootstrap interval."""

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
