from __future__ import annotations

import pytest
import torch

from medalign.observability.meters import Meter, Throughput, peak_memory_gib


def test_means_are_sums_over_counts_and_start_again():
    meter = Meter(["loss/language", "loss/attention"])
    meter.add("loss/language", torch.tensor(6.0, requires_grad=True), torch.tensor(3))
    meter.add("loss/language", 4.0, 1)
    assert meter.reduce() == {"loss/language": 2.5}  # no count for the other name: left out, not zero
    assert meter.reduce() == {}


def test_unknown_name_is_an_error():
    with pytest.raises(KeyError, match="loss/other"):
        Meter(["loss/total"]).add("loss/other", 1.0)


def test_empty_meter():
    assert Meter([]).reduce() == {}


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
