"""The time of a module on a CUDA stream of its own."""

from __future__ import annotations

import pytest
import torch

from medalign.observability.meters import ModuleTimer

pytestmark = pytest.mark.gpu
PAUSE = 20_000_000  # clock cycles, 10 ms at 2 GHz


class Sleeper(torch.nn.Module):
    """Keeps its stream busy."""

    def forward(self) -> None:
        torch.cuda._sleep(PAUSE)


def test_the_passes_on_another_stream_are_timed_without_waiting(cuda):
    module, stream = Sleeper(), torch.cuda.Stream(cuda)
    timer = ModuleTimer(module, cuda)
    with torch.cuda.stream(stream):
        for _ in range(5):
            module()
    assert not stream.query(), "the host has waited for the passes"
    assert 0.01 < timer.take() < 1  # 5 passes of 6 ms at 3 GHz, or of 100 ms at 200 MHz
    assert timer.take() == 0.0
