"""Training of tiny models on one rank: NCCL, every packaged ZeRO setting, bf16, and a kill with a resume.

With eager attention, a run that was killed resumes bit-identically on a GPU, since every operation of a step sums in a
fixed order. SDPA and flash-attention sum parts of their gradients in varying order: two runs with the same settings
agree within rounding, and so does a run that was killed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from medalign.losses import build_objective
from medalign.student.loading import load_student
from medalign.teacher.loading import load_teacher
from medalign.teacher.targets import teacher_targets
from tests.distributed.ranks import finish, start
from tests.distributed.test_zero3 import assert_same
from tests.distributed.workers import configure, share
from tests.e2e.conftest import kill_at, losses, train

pytestmark = pytest.mark.gpu
STEPS = 50
# bf16 keeps 8 bits: 2^-8 per rounding, about 12 of them, with either sign, between the pixels and a loss. ZeRO keeps
# the trained weights in float32, so that the roundings of different steps do not add up. On a CPU, the curves differ
# by less than 0.0006.
BAND = 12**0.5 * 2**-8
RESUMED = 0.05  # a loss that differs by bf16 gradients summed in another order; an estimate, not measured on a GPU


def run(worker: str, settings: dict[str, Any], folder: Path) -> Any:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "settings.json").write_text(json.dumps(settings))
    finish(start(["-m", "tests.gpu.workers", worker, str(folder)], 1))
    return json.loads((folder / "result-0.json").read_text())


@pytest.fixture(scope="module")
def settings(student_folder: Path, teacher_folder: Path) -> dict[str, Any]:
    return {"student": str(student_folder), "teacher": str(teacher_folder), "steps": 3, "batch": 4, "micro": 4}


def test_nccl_on_one_rank(cuda, tmp_path):
    found = run("collectives", {}, tmp_path)
    assert found["backend"] == "nccl" and all(found["same"].values()), found


@pytest.fixture(scope="module")
def engines(cuda, settings, tmp_path_factory) -> dict[str, Any]:
    named = {name: {"engine": name} for name in ("zero2", "zero3", "zero3_offload")}
    return run("scenarios", {"common": settings, "scenarios": named}, tmp_path_factory.mktemp("engines"))


@pytest.mark.parametrize("engine", ["zero3", "zero3_offload"])
def test_every_engine_takes_the_same_steps(cuda, engines, engine):
    assert_same(engines["zero2"], engines[engine])
    assert engines[engine]["frozen"]["before"] == engines[engine]["frozen"]["after"]
    assert any("lora_" in name for name in engines[engine]["changed"])


def first_losses(settings: dict[str, Any], device: torch.device) -> dict[str, float]:
    """Return the terms of the first step, in float32, without an engine."""
    config = configure(settings)
    teacher = load_teacher(config.teacher.path, device)
    student = load_student(config.student, torch.float32).to(device)
    (batch,) = share(settings, 0)
    batch, objective = batch.to(device), build_objective(config)
    targets = teacher_targets(teacher, batch.teacher_pixels, student.spec.grid)
    report = objective(student(batch), targets, batch, dict.fromkeys(objective.coefficients, 1.0))
    return {name: float(term.sum.detach() / term.count) for name, term in report.terms.items()}


def test_the_first_losses_are_those_of_the_cpu(device, settings):
    """The convolution of the patches uses TF32 in cuDNN: a rounding of 2^-11, amplified about ten times after it."""
    found, expected = first_losses(settings, device), first_losses(settings, torch.device("cpu"))
    assert found.keys() == expected.keys() == {"language", "similarity", "attention"}
    assert found == pytest.approx(expected, rel=12 * 2**-11)


def test_bf16_learns_as_fp32_does(device, rehearsing, settings, tmp_path):
    """The same batch in every step, so that the curve has no noise of the data."""
    common = settings | {"steps": 6 if rehearsing else STEPS, "same": True, "engine": "cpu" if rehearsing else "zero3"}
    named = {"bf16": {"precision": "bf16"}, "fp32": {"precision": "fp32"}}
    found = run("scenarios", {"common": common, "scenarios": named}, tmp_path)
    bf16, fp32 = ([row["loss/total"] for row in found[name]["losses"]] for name in ("bf16", "fp32"))
    assert bf16 != fp32, "nothing was rounded, so this was not a bf16 run"
    assert fp32[-1] < fp32[0] and bf16[-1] < bf16[0]
    for step, (one, other) in enumerate(zip(bf16, fp32, strict=True)):
        assert abs(one - other) <= BAND * fp32[0], f"step {step + 1}: {one} in bf16, {other} in fp32"


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, student_folder, teacher_folder) -> Path:
    from medalign import phantom

    folder = tmp_path_factory.mktemp("recipe")
    phantom.write_phantoms(folder / "shards", 16, 1, 0)
    engine = "zero3" if torch.cuda.is_available() else "cpu"
    (folder / "tiny.yaml").write_text(
        f"student: {{path: {student_folder}, layer: 2, lora: {{rank: 4, dropout: 0.1}}}}\n"
        f"teacher: {{path: {teacher_folder}}}\n"
        f"data: {{train: {folder}/shards/train, max_length: 220}}\n"
        "train: {steps: 8, batch_size: 4, micro_batch_size: 2, lr: 1.0e-3}\n"
        f"engine: {{deepspeed: {engine}}}\n"
        "checkpoint: {interval: 3, save_total_limit: 2}\n"
        "log: {interval: 1, wandb: 'off'}\n"
    )
    return folder / "tiny.yaml"


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_killed_run_resumes(cuda, recipe, tmp_path, monkeypatch, attention):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it, cuBLAS may sum in another order
    words = ("--student.attention", attention, "--train.precision", "fp32" if attention == "eager" else "bf16")
    train(recipe, tmp_path / "whole", *words)
    kill_at(recipe, tmp_path / "killed", 5, *words)
    (output,) = train(recipe, tmp_path / "killed", *words)
    assert "resuming from" in output
    whole, killed = losses(tmp_path / "whole"), losses(tmp_path / "killed")
    assert len(whole) == len(killed) == 8
    if attention == "eager":
        assert killed == whole
    for one, other in zip(killed, whole, strict=True):
        assert one == pytest.approx(other, rel=RESUMED)
