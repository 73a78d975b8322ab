"""The callbacks that add to the rows of metrics."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from medalign import config
from medalign.checkpoint.state import TrainState
from medalign.config import Config
from medalign.contracts import IGNORE
from medalign.data.order.mixture import Mixture
from medalign.data.order.order import GlobalOrder
from medalign.planning.cards import CARDS, find_card
from medalign.planning.shapes import student_on_meta, teachers_on_meta
from medalign.planning.work import operations
from medalign.training.callbacks import DataProgress, Efficiency
from medalign.training.model_flops import ModelFlops, model_flops
from medalign.training.progress import job_metrics
from tests import tiny


@pytest.fixture(scope="module")
def settings(student_folder, teacher_folder) -> Config:
    words = [f"--student.path={student_folder}", f"--teacher.path={teacher_folder}", "--student.layer=2"]
    return config.load("phantom", [*words, "--data.train=c", "--student.gradient_checkpointing=true"])


def test_the_operations_of_a_batch_are_those_of_the_plan_without_recomputation(settings):
    student, teachers = student_on_meta(settings.student, torch.float32), teachers_on_meta(settings)
    batch, flops = tiny.batch(texts=((5, 4), (40, 2))), ModelFlops(settings)
    expected = sum(
        operations(student, teachers, int(length), int(supervised), checkpointing=False).total
        for length, supervised in zip(batch.attention_mask.sum(1), (batch.labels != IGNORE).sum(1), strict=True)
    )
    assert flops(batch) == pytest.approx(expected, rel=1e-12)
    assert flops(tiny.packed(batch)) == pytest.approx(expected, rel=1e-12)
    assert flops(batch) < sum(operations(student, teachers, 58, 4, checkpointing=True).total for _ in batch.keys)


def test_operations_that_cannot_be_counted_leave_out_the_metric(caplog):
    assert model_flops(Config()) is None
    assert "speed/tflops and speed/mfu are not logged" in caplog.text


def trainer(**state: int) -> SimpleNamespace:
    return SimpleNamespace(
        config=Config(),  # batches of 32
        state=TrainState(step=0, ranks=1, **({"samples": 0} | state)),
        step=SimpleNamespace(engine=SimpleNamespace(device=torch.device("cpu"))),
    )


def test_efficiency_is_measured_since_the_last_row():
    now = 0.0
    timer = SimpleNamespace(take=lambda: 0.5)
    gauge = Efficiency(lambda batch: 1e12, 4e12, [timer], lambda: now)
    gauge.on_train_start(trainer())
    gauge.on_batch(trainer(), [tiny.batch()] * 4)
    now = 2.0
    expected = {"speed/tflops": 2.0, "speed/mfu": 0.5, "speed/teacher_share": 0.25}
    assert gauge.metrics(trainer()) == pytest.approx(expected, rel=1e-6)  # the ranks' sums are float32
    now = 3.0
    assert gauge.metrics(trainer())["speed/tflops"] == 0.0


def test_what_is_not_known_is_left_out():
    assert Efficiency(None, None, ()).metrics(trainer()) == {}
    assert set(Efficiency(lambda batch: 1.0, None, ()).metrics(trainer())) == {"speed/tflops"}


def test_samples_are_counted_by_folder_also_where_a_run_resumes():
    sizes = [30, 70]
    order = Mixture([GlobalOrder(size, 0, stream=i) for i, size in enumerate(sizes)], [3.0, 1.0], 0)
    gauge = DataProgress(order, sizes)
    for samples in (8, 4096):
        found = gauge.metrics(trainer(samples=samples))
        expected = np.bincount(order.indices_at(np.arange(samples)) >= 30)
        assert list(found.values()) == list(expected)
    assert found == {"data/source_0_samples": 3072, "data/source_1_samples": 1024}
    assert DataProgress(order, sizes).metrics(trainer(samples=4096)) == found
    gauge.on_train_start(trainer())  # after a rewind from sample 4096 to 2048, which leaves out 64 batches of 32
    assert gauge.metrics(trainer(samples=2048, skipped_batches=64)) == found


def test_one_folder_has_epochs_and_no_sources():
    assert DataProgress(GlobalOrder(80, 0), [80]).metrics(trainer(samples=100)) == {"train/epoch": 1.25}


@pytest.mark.parametrize(
    ("name", "card"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA B200", "b200"),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA GeForce RTX 3090", None),
    ],
)
def test_a_card_is_found_by_the_name_that_cuda_reports(name, card):
    assert find_card(name) == CARDS.get(card)


@pytest.mark.parametrize(("job", "found"), [("123", {"job/id": 123}), ("", {}), ("array", {})])
def test_the_job_has_its_number(monkeypatch, job, found):
    monkeypatch.setenv("SLURM_JOB_ID", job)
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert job_metrics() == {"job/world_size": 3} | found
