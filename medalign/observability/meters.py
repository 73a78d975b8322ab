"""Throughput and memory of a run. The counts are summed over the ranks once per row of metrics."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from medalign.distributed import sum_over_ranks


class Throughput:
    """Samples and tokens per second over all ranks, and the fraction of time that ranks wait for data.

    Args:
        device: device of the tensors that are summed over the ranks.
        clock: returns the time in seconds.
    """

    def __init__(self, device: torch.device | str = "cpu", clock: Callable[[], float] = time.perf_counter) -> None:
        self._device = device
        self._clock = clock
        self._restart()

    def add(self, samples: int, tokens: int) -> None:
        """Count one micro-batch of this rank."""
        self._samples += samples
        self._tokens += tokens

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Measure the time spent inside the context as waiting for data."""
        start = self._clock()
        try:
            yield
        finally:
            self._waited += self._clock() - start

    def reduce(self) -> dict[str, float]:
        """Return the speeds over all ranks since the last call. Every rank must call it.

        Time is the mean over the ranks.
        """
        local = [self._samples, self._tokens, self._waited, self._clock() - self._start, 1.0]
        stacked = torch.tensor(local, dtype=torch.float64, device=self._device)
        samples, tokens, waited, seconds, ranks = sum_over_ranks({"speed": stacked})["speed"].tolist()
        self._restart()
        wall = max(seconds / ranks, 1e-9)
        return {
            "speed/samples_per_second": samples / wall,
            "speed/tokens_per_second": tokens / wall,
            "speed/data_wait_share": min(waited / max(seconds, 1e-9), 1.0),
        }

    def _restart(self) -> None:
        self._samples = self._tokens = 0
        self._waited = 0.0
        self._start = self._clock()


def peak_memory_gib(device: torch.device | str) -> float:
    """Return the peak memory of this rank so far, in GiB: allocated on the GPU, or resident in the process on a CPU."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**30 if sys.platform == "darwin" else peak / 2**20
