"""What a run counts between two rows of metrics, summed over the ranks once a row: all call `reduce` together."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from medalign.distributed import sum_over_ranks


class Throughput:
    """Samples and tokens a second of the whole job, and the share of the time that ranks wait for data."""

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
        """Wrap the wait for the next batch."""
        start = self._clock()
        try:
            yield
        finally:
            self._waited += self._clock() - start

    def reduce(self) -> dict[str, float]:
        """The speeds over all ranks since the last call. Time is the mean over ranks."""
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
    """Most memory this rank has held so far, in GiB: allocated on the GPU, or resident in the process."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**30 if sys.platform == "darwin" else peak / 2**20
