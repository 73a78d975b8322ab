"""Killed again and again, at any moment, a run ends with the losses of the run that was never interrupted."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.distributed.ranks import TIMEOUT, start
from tests.e2e.conftest import command, kill_at, losses, train

# Two ranks with a loader process each, samples grouped by length, 1.7 epochs.
TWO = ("--data.workers", "1", "--data.length_groups", "2", "--train.steps", "10", "--train.micro_batch_size", "1")


@pytest.fixture(scope="module")
def few(tmp_path_factory) -> Path:
    """Shards of fewer samples than the run draws."""
    from medalign.data import phantom

    folder = tmp_path_factory.mktemp("few")
    report = phantom.write(folder, 4, 1, 0)["train"]
    assert 20 <= report.written < 40
    return folder / "train"


def test_two_ranks_killed_twice_go_on_exactly(recipe, few, tmp_path):
    words = (*TWO, "--data.train", str(few))
    train(recipe, tmp_path / "whole", *words, world=2)
    folder = tmp_path / "killed"
    for step in (4, 8):
        kill_at(recipe, folder, step, *words, world=2)
    output = train(recipe, folder, *words, world=2)[0]
    assert "going on from" in output
    assert len(losses(folder)) == 10 and losses(folder) == losses(tmp_path / "whole")


def test_kills_while_a_checkpoint_is_written_lose_nothing(recipe, trained, tmp_path):
    """Step 6 is written and not renamed, then renamed and not named by `latest`; both times step 3 is gone on from."""
    folder = tmp_path / "killed"
    checkpoints = folder / "checkpoints"
    for moment, left in (("rename", ".partial-step-000006"), ("pointer", "step-000006")):
        (process,) = start(["-m", "tests.e2e.dying", moment, "000006", *command(recipe, folder)[2:]], 1)
        output, _ = process.communicate(timeout=TIMEOUT)
        assert process.returncode == -9, output
        assert (checkpoints / "latest").read_text().strip() == "step-000003"
        assert (checkpoints / left / "progress.json").is_file()
    train(recipe, folder)
    assert losses(folder) == losses(trained)
    assert sorted(path.name for path in checkpoints.iterdir()) == ["latest", "step-000006", "step-000008"]


def refused(recipe: Path, folder: Path, *words: str) -> str:
    """What a run says that ends with status 2, without a traceback."""
    (process,) = start(command(recipe, folder, words), 1)
    output, _ = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 2 and "Traceback" not in output, output
    return output


def test_a_failed_first_start_leaves_its_folder_free(recipe, tmp_path):
    assert "not a model folder" in refused(recipe, tmp_path, "--student.path", "/nowhere", "--train.lr", "0.5")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lock"]


def test_a_run_goes_on_with_its_own_stage_and_data_alone(recipe, trained, few, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(trained, folder)
    settings = (folder / "config.yaml").read_text()
    assert "step-000008 is of ZeRO stage 3" in refused(recipe, folder, "--engine.deepspeed", "zero2")
    assert "data.train is not what" in refused(recipe, folder, "--data.train", str(few))
    assert (folder / "config.yaml").read_text() == settings
