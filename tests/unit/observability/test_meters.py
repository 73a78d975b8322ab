from __future__ import annotations

import pytest
import torch

from medalign.observability.meters import ModuleTimer, Throughput, memory_gib


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


def test_the_passes_of_a_module_are_timed():
    clock = Clock()

    class Slow(torch.nn.Module):
        def forward(self, seconds: float) -> None:
            clock.now += seconds

    module = Slow()
    timer = ModuleTimer(module, torch.device("cpu"), clock)
    for seconds in (1.0, 2.0):
        module(seconds)
        clock.now += 10.0
    assert timer.take() == 3.0
    assert timer.take() == 0.0
    module(0.5)
    assert timer.take() == 0.5


def test_the_memory_of_a_process_without_a_gpu_is_that_of_the_cpu():
    (name, peak), *others = memory_gib(torch.device("cpu")).items()
    assert name == "memory/cpu_peak_gib" and not others
    assert 0.01 < peak < 1000
