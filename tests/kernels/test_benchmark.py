"""The benchmark's own steps run, and its eager form computes what the kernels compute."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from medalign.kernels import token_similarity

TOOL = Path(__file__).resolve().parents[2] / "tools" / "benchmark_kernels.py"


@pytest.fixture(scope="module")
def benchmark():
    specification = importlib.util.spec_from_file_location("benchmark_kernels", TOOL)
    module = importlib.util.module_from_spec(specification)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, specification.name, module)  # dataclasses look themselves up
        specification.loader.exec_module(module)
        yield module


def test_every_path_of_the_quick_cases_computes_the_same(benchmark):
    for case in benchmark.QUICK:
        make = benchmark.similarity_step if case.kind == "similarity" else benchmark.attention_step
        losses = {}
        for path in case.paths:
            torch.manual_seed(0)
            losses[path] = make(case, path, "cpu")()
        losses.pop("sdpa", None)  # plain attention, without the map's share
        for path, loss in losses.items():
            torch.testing.assert_close(loss, losses["eager"], msg=f"{case.name}: {path}")


def test_the_eager_form_is_the_same_loss(benchmark):
    student, teacher = torch.randn(2, 9, 5), torch.randn(2, 9, 4)
    torch.testing.assert_close(benchmark.eager_similarity(student, teacher), token_similarity(student, teacher))
