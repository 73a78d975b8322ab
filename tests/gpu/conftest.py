"""Tests that need a CUDA device. `tools/gpu_check.sh` runs them; elsewhere they are skipped.

`pytest tests/gpu --rehearse` runs on the CPU what can run there, with small sizes and interpreted kernels, so that the
tests themselves do not rot.
"""

from __future__ import annotations

import pytest
import torch

from medalign.kernels import gpu

NO_CUDA = "no CUDA device is there; tools/gpu_check.sh runs this test on a machine with one"
INTERPRETED = (
    "TRITON_INTERPRET is set, and the kernels would be interpreted; run tools/gpu_check.sh, which sets it to 0"
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--rehearse", action="store_true", help="run GPU tests on the CPU, small, where that is possible")


@pytest.fixture(scope="session")
def rehearsing(request: pytest.FixtureRequest) -> bool:
    return not torch.cuda.is_available() and bool(request.config.getoption("--rehearse", default=False))


@pytest.fixture(scope="session")
def device(rehearsing: bool) -> torch.device:
    """The GPU; the CPU in a rehearsal."""
    if rehearsing:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        pytest.skip(NO_CUDA)
    if gpu.interpreting():
        pytest.skip(INTERPRETED)
    return torch.device("cuda", 0)


@pytest.fixture(scope="session")
def cuda(device: torch.device) -> torch.device:
    """The GPU, for what a CPU cannot rehearse."""
    if device.type != "cuda":
        pytest.skip("streams and NCCL are a GPU's; a CPU cannot rehearse them")
    return device
