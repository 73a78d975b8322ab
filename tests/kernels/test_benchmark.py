"""The benchmark's own steps run, and its eager form computes what the kernels compute."""

import torch

from medalign.kernels import token_similarity
from tools.benchmarks import kernels as benchmark


def test_every_path_of_the_quick_cases_computes_the_same():
    for case in benchmark.QUICK:
        make = benchmark.similarity_step if case.kind == "similarity" else benchmark.attention_step
        losses = {}
        for path in case.paths:
            torch.manual_seed(0)
            losses[path] = make(case, path, "cpu")()
        losses.pop("sdpa", None)  # plain attention, without the map's share
        for path, loss in losses.items():
            torch.testing.assert_close(loss, losses["eager"], msg=f"{case.name}: {path}")


def test_the_eager_form_is_the_same_loss():
    student, teacher = torch.randn(2, 9, 5), torch.randn(2, 9, 4)
    torch.testing.assert_close(benchmark.eager_similarity(student, teacher), token_similarity(student, teacher))
