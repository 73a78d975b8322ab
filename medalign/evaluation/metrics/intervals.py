"""Means with a bootstrap interval."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

RESAMPLES = 1000


def mean(name: str, values: Sequence[float | bool]) -> dict[str, float]:
    """Return the mean of the values and the 2.5 and 97.5 % quantiles of its bootstrap, or nothing without values.

    The resampling uses a fixed seed, so the same predictions give the same interval.

    Args:
        name: key of the mean; the quantiles have the keys NAME_low and NAME_high.
        values: one value per sample.
    """
    if not values:
        return {}
    values_S = np.asarray(values, dtype=np.float64)
    draw = np.random.default_rng(0)
    means = [values_S[draw.integers(0, values_S.size, values_S.size)].mean() for _ in range(RESAMPLES)]
    low, high = np.quantile(means, [0.025, 0.975])
    return {name: float(values_S.mean()), f"{name}_low": float(low), f"{name}_high": float(high)}
