from __future__ import annotations

import pytest

from medalign.observability.meters import Throughput, peak_memory_gib


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_throughput_counts_samples_tokens_and_waiting():
    clock = Clock()
    speed = Throughput(clock=clock)
    with speed.waiting():
        clock.now = 1.0
    speed.add(8, 800)
    clock.now = 4.0
    expected = {
        "speed/samples_per_second": 2.0,
        "speed/tokens_per_second": 200.0,
        "speed/data_wait_share": 0.25,
    }
    assert speed.reduce() == pytest.approx(expected)
    clock.now = 5.0
    assert speed.reduce()["speed/samples_per_second"] == 0.0


def test_peak_memory_is_plausible():
    assert 0.01 < peak_memory_gib("cpu") < 1000
