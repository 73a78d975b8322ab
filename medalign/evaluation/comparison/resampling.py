"""Intervals and tests for a paired difference of scores. All are reproducible: their random numbers have a fixed seed.

A score is a function of sums over samples, such as a mean (a sum and a count) or BLEU (counts of n-grams). Samples of
one cluster, such as the questions about one image, are not independent: clusters are resampled and swapped as a whole.

Shape suffixes: C clusters, K statistics, N seeds, R resamples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

RESAMPLES = 2000
PERMUTATIONS = 10_000
_CHUNK = 500  # resamples at once, which bounds the memory
_TIE = 1e-12  # relative: permutations of equal value differ by rounding

Score = Callable[[np.ndarray], np.ndarray]  # sums [R, K] -> scores [R]


def cluster_bootstrap(a_CK: np.ndarray, b_CK: np.ndarray, score: Score) -> tuple[float, float]:
    """Return the 2.5 and 97.5 % quantiles of score(B) - score(A) over resampled clusters.

    Args:
        a_CK: the sums of statistics of each cluster in system A.
        b_CK: those of system B on the same samples.
        score: the score of sums.
    """
    draw = np.random.default_rng(0)
    clusters = len(a_CK)
    differences = []
    for _ in range(RESAMPLES // _CHUNK):
        times_RC = draw.multinomial(clusters, np.full(clusters, 1 / clusters), size=_CHUNK).astype(np.float64)
        differences.append(score(times_RC @ b_CK) - score(times_RC @ a_CK))
    low, high = np.quantile(np.concatenate(differences), [0.025, 0.975])
    return float(low), float(high)


def cluster_permutation(a_CK: np.ndarray, b_CK: np.ndarray, score: Score) -> float:
    """Return the two-sided p-value of the test that swaps the systems cluster by cluster.

    All swaps are tried if there are at most PERMUTATIONS; otherwise this many are drawn, and the observed one counts
    as one more (Phipson and Smyth 2010), so that p is never 0.
    """
    clusters = len(a_CK)
    exact = 2**clusters <= PERMUTATIONS
    draw = np.random.default_rng(0)
    total = 2**clusters if exact else PERMUTATIONS
    change_CK = b_CK - a_CK
    observed = abs(_difference(a_CK.sum(0)[None], b_CK.sum(0)[None], score)[0])
    extreme = 0
    for first in range(0, total, _CHUNK):
        count = min(_CHUNK, total - first)
        if exact:
            swaps_RC = (np.arange(first, first + count)[:, None] >> np.arange(clusters)) & 1
        else:
            swaps_RC = draw.integers(0, 2, size=(count, clusters))
        moved_RK = swaps_RC.astype(np.float64) @ change_CK
        found_R = np.abs(_difference(a_CK.sum(0) + moved_RK, b_CK.sum(0) - moved_RK, score))
        extreme += int((found_R >= observed - _TIE * max(observed, 1.0)).sum())
    return extreme / total if exact else (extreme + 1) / (total + 1)


def _difference(a_RK: np.ndarray, b_RK: np.ndarray, score: Score) -> np.ndarray:
    return score(b_RK) - score(a_RK)


def seed_interval(differences_N: Sequence[float]) -> tuple[float, float, float]:
    """Return the 95 % t-interval of the mean difference over seeds, and the p-value of the paired t-test.

    If all differences are equal, the t-test is not defined: p is 1 if they are 0, otherwise that of the test that flips
    signs.

    Args:
        differences_N: one difference per seed, at least two.
    """
    from scipy import stats

    values_N = np.asarray(differences_N, dtype=np.float64)
    count, middle = len(values_N), float(values_N.mean())
    error = float(values_N.std(ddof=1)) / np.sqrt(count)
    if error <= _TIE * max(abs(middle), 1.0):
        return middle, middle, sign_flip(values_N)
    reach = float(stats.t.ppf(0.975, count - 1)) * error
    return middle - reach, middle + reach, float(2 * stats.t.sf(abs(middle) / error, count - 1))


def sign_flip(differences_N: Sequence[float] | np.ndarray) -> float:
    """Return the two-sided p-value of the test that flips the signs of the differences."""
    values_N1 = np.asarray(differences_N, dtype=np.float64)[:, None]
    return cluster_permutation(np.zeros_like(values_N1), values_N1, lambda sums_RK: sums_RK[:, 0])


def mcnemar(a: Sequence[float], b: Sequence[float]) -> tuple[int, int, float]:
    """Return how many samples only A has right, how many only B has right, and the exact two-sided McNemar p-value.

    The test takes samples as independent. For samples in clusters, `cluster_permutation` is the test to rely on.

    Args:
        a: 1 or 0 for each sample in system A.
        b: 1 or 0 for each sample in system B.
    """
    from scipy import stats

    only_a = sum(x > y for x, y in zip(a, b, strict=True))
    only_b = sum(y > x for x, y in zip(a, b, strict=True))
    p = float(stats.binomtest(only_a, only_a + only_b).pvalue) if only_a + only_b else 1.0
    return only_a, only_b, p


def holm(p_values: Sequence[float]) -> list[float]:
    """Return the p-values adjusted by Holm's method (1979) for the number of tests."""
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted
