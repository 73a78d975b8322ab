"""The kernel benchmarks: every path gives the same result, and a GPU's times are those of the device."""

import time
from types import SimpleNamespace

import pytest
import torch

from medalign.benchmark.kernels import gpu_timing
from medalign.benchmark.kernels.text import as_table
from tools.benchmarks import kernels


@pytest.mark.parametrize("case", kernels.QUICK, ids=lambda case: case.name)
def test_every_path_of_the_quick_cases_computes_the_same(case):
    found = {}
    for path in case.paths:
        torch.manual_seed(0)
        found[path] = kernels.step_of(case, path)()
    found.pop("sdpa", None)  # attention without the map's share of the loss
    for path, results in found.items():
        for one, other in zip(results, found["eager"], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7, msg=f"{case.name}: {path}")


class Device:
    """A stand-in for torch on a GPU, which writes down what is enqueued."""

    uint8 = None

    def __init__(self):
        self.calls, self.cuda = [], self
        self.Event = lambda enable_timing: SimpleNamespace(
            record=lambda: self.calls.append("record"), elapsed_time=lambda end: 2.0
        )

    def empty(self, *_, **__):
        return SimpleNamespace(zero_=lambda: self.calls.append("empty the cache"))

    def _sleep(self, cycles):
        assert cycles > gpu_timing.CYCLES * 2 * 0.01, "the host needs 10 ms"
        self.calls.append("sleep")

    def synchronize(self):
        self.calls.append("wait")


def test_a_gpu_sleeps_with_an_empty_cache_until_the_host_has_enqueued_the_run(monkeypatch):
    device = Device()
    monkeypatch.setattr(gpu_timing, "torch", device)

    def step():
        device.calls.append("step")
        time.sleep(0.01)

    times, host = gpu_timing.gpu_milliseconds(step, 2)
    assert times == [2.0, 2.0] and len(host) == 2 and min(host) >= 10
    run = ["empty the cache", "sleep", "record", "step", "record", "wait"]
    assert device.calls == ["step"] * gpu_timing.WARM_UP + ["wait", "step", *run, *run]


def test_rows_with_other_keys_share_a_table():
    shown = as_table("t", [{"entry": "a", "rows": 1}, {"entry": "b", "pairs": 2}]).splitlines()
    assert [line.split() for line in shown[1:]] == [["entry", "rows", "pairs"], ["a", "1"], ["b", "2"]]
