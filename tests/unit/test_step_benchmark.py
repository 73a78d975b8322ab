"""The step benchmark's counts. tests/e2e/test_gpu_check.py checks that every form takes the same step."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from medalign.losses.language_model import language_model
from tools.benchmarks.step import measuring, models, utilization
from tools.benchmarks.step.forms import FORMS


def test_operations_are_those_that_torch_counts():
    """Except for attention, of which torch counts both halves, and the patches' convolution, which is not counted."""
    config = models.settings(2, "cpu", 2, models.TINY.rank).student
    student = models.random_student(models.TINY, config, torch.device("cpu"), torch.float32)
    student.steering = None
    batch = models.make_batch(student, 32, 2, models.TINY.text)
    with FlopCounterMode(display=False) as counter:
        output = student(batch, tap=False)
        language_model(output.logits, output.kept, batch.labels).sum.backward()
    counts = {str(name).removeprefix("aten."): value for name, value in counter.get_flop_counts()["Global"].items()}
    products = sum(value for name, value in counts.items() if name in ("mm", "addmm", "bmm"))
    assert products > 0.8 * sum(counts.values())
    # The first block's input needs no gradient, but its projections are counted as if it did: 8 % of this student.
    assert utilization.plain_flops(student, batch) == pytest.approx(sum(counts.values()), rel=0.1)


@pytest.mark.parametrize(
    ("card", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA GB200", 2500e12),
        ("Tesla V100-SXM2-32GB", None),
    ],
)
def test_peaks_by_name(card, peak):
    assert utilization.peak(card) == peak


def test_the_tapped_block_has_the_relative_depth_of_block_20_of_32():
    assert [models.tapped_layer(blocks) for blocks in (2, 4, 12, 32)] == [1, 2, 7, 20]


def test_blocks_follow_from_two_peaks(monkeypatch):
    """The blocks take 2 GiB each, the teacher 1 GiB, everything else 5 GiB, and 0.9 of 60 GiB are available."""
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (60 * 2**30, 80 * 2**30))
    monkeypatch.setattr(measuring, "_timed", lambda bench, *_: (0.1, (1 + 5 + 2 * bench.blocks) * 2**30, 0.0))
    bench_of = lambda blocks: SimpleNamespace(blocks=blocks, teacher_bytes=2**30)  # noqa: E731
    plan = measuring.plan_blocks(bench_of, 32, torch.device("cuda"))
    assert plan == {"free_gib": 54.0, "gib_per_block": 2.0, "gib_beside": 5.0, "blocks": 24}
    assert measuring.plan_blocks(bench_of, 16, torch.device("cuda"))["blocks"] == 16


def test_memory_counts_the_student_and_a_teacher_that_runs(monkeypatch):
    """Of 50 GiB at the peak, 9 were there before: a teacher of 2 GiB, and earlier students."""
    for name in ("synchronize", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda device: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 50)
    bench = SimpleNamespace(before=9, teacher_bytes=2, take=lambda form: {"loss/total": 1.0})
    peaks = {form.name: measuring._timed(bench, form, torch.device("cuda"))[1] for form in FORMS}
    given = dict.fromkeys(("plain", "medalign_given", "released_given"), 41)
    assert peaks == given | dict.fromkeys(("medalign_online", "released_online"), 43)
