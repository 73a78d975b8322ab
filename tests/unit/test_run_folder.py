"""The layout of a run's folder: the names on disk, and the run that a path belongs to."""

from __future__ import annotations

from pathlib import Path

import pytest

from medalign.run_folder import CheckpointFolder, RunFolder, find_run


def test_the_names_are_those_of_runs_on_disk():
    run = RunFolder(Path("runs/first"))
    checkpoint, evaluation = run.checkpoints.step(500), run.evaluation("val")
    files = [run.config, run.environment, run.metrics, run.lock, run.wandb_run_id, run.checkpoints.latest]
    files += [checkpoint.export, checkpoint.progress, checkpoint.config, checkpoint.marker]
    files += [evaluation.predictions, evaluation.scores]
    assert [str(path.relative_to(run.path)) for path in files] == [
        "config.yaml",
        "environment.json",
        "metrics.jsonl",
        "lock",
        "wandb_run_id",
        "checkpoints/latest",
        "checkpoints/step-000500/export",
        "checkpoints/step-000500/progress.json",
        "checkpoints/step-000500/config.yaml",
        "checkpoints/step-000500/complete.json",
        "evaluation/val/predictions.jsonl",
        "evaluation/val/scores.json",
    ]


def test_checkpoints_are_found_by_step(tmp_path):
    checkpoints = RunFolder(tmp_path).checkpoints
    assert checkpoints.by_step() == {} and checkpoints.read_latest() is None
    for name in ("step-1000000", "step-000500", "step-000020", "step-x", ".partial-step-000030"):
        (checkpoints.path / name).mkdir(parents=True)
    assert list(checkpoints.by_step()) == [20, 500, 1_000_000]
    assert [folder.step for folder in checkpoints.by_step().values()] == [20, 500, 1_000_000]
    checkpoints.latest.write_text("step-000500\n")
    assert checkpoints.read_latest() == checkpoints.step(500)
    for text in ("", "\0" * 12, "../step-000500", "step-"):
        checkpoints.latest.write_text(text)
        assert checkpoints.read_latest() is None


def test_evaluations_are_those_with_scores(tmp_path):
    run = RunFolder(tmp_path)
    assert run.evaluations() == []
    for name in ("val", "step-000500-val", "unfinished"):
        run.evaluation(name).path.mkdir(parents=True)
    for name in ("val", "step-000500-val"):
        run.evaluation(name).scores.write_text("{}")
    assert [folder.path.name for folder in run.evaluations()] == ["step-000500-val", "val"]
    assert [folder.path.name for folder in run.evaluations("step-000500-")] == ["step-000500-val"]


@pytest.mark.parametrize("inside", [lambda checkpoint: checkpoint.path, lambda checkpoint: checkpoint.export])
def test_a_checkpoint_and_its_export_belong_to_their_run(tmp_path, inside):
    checkpoint: CheckpointFolder = RunFolder(tmp_path).checkpoints.step(20)
    checkpoint.export.mkdir(parents=True)
    assert find_run(inside(checkpoint)) == (RunFolder(tmp_path.resolve()), "step-000020-")
    assert find_run(tmp_path / "copy") == (RunFolder(tmp_path / "copy"), "")
