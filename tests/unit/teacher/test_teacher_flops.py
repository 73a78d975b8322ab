"""The published operation counts are those of the towers."""

import json
from pathlib import Path

import pytest
import torch

from tools.benchmarks import teacher_flops

RESULTS = json.loads((Path(teacher_flops.__file__).parent / "results" / "teacher_flops.json").read_text())


def test_the_table_is_complete():
    assert set(RESULTS["teachers"]) == set(teacher_flops.TEACHERS)


@pytest.mark.parametrize("name", [name for name in teacher_flops.TEACHERS if "BiomedCLIP" in name or "BioViL" in name])
def test_counts_can_be_repeated(name):
    with torch.device("meta"):
        tower = teacher_flops.TEACHERS[name]().eval()
    assert teacher_flops.teacher_flops(tower) == pytest.approx(RESULTS["teachers"][name]["gflop"], abs=0.05)


def test_a_count_by_hand():
    """One layer of a product of [2, 3] and [3, 5]: two operations per multiplication."""
    left, right = torch.empty(2, 3, device="meta"), torch.empty(3, 5, device="meta")
    assert teacher_flops.count(lambda: left @ right) == 2 * 2 * 3 * 5 / 1e9
