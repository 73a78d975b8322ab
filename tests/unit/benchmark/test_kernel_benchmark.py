"""The kernel benchmarks: every path gives the same result, and GPU times come from Triton's own benchmark."""

import pytest
import torch
from triton import testing

from medalign.benchmark.kernels.measurement import milliseconds
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


def test_gpu_times_empty_the_cache_between_runs(monkeypatch):
    """A step of 2 ms, 5 times: `do_bench` is given 10 ms."""
    calls = []

    def do_bench(step, warmup, rep, return_mode):
        calls.append((warmup, rep, return_mode))
        return 2.0 if return_mode == "min" else [2.0, 2.5]

    monkeypatch.setattr(testing, "do_bench", do_bench)
    assert milliseconds(lambda: None, torch.device("cuda"), 5) == [2.0, 2.5]
    assert calls == [(0, 0, "min"), (4.0, 10.0, "all")]
