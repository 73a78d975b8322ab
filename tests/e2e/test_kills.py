"""Killed again and again, at any moment, a run ends with the losses of the run that was never interrupted."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path

import pytest

from medalign import config
from medalign.__main__ import main
from tests.distributed.ranks import TIMEOUT, start
from tests.e2e.conftest import command, losses, train

# Two ranks with a loader process each, samples grouped by length, 1.7 epochs.
TWO = ("--data.workers", "1", "--data.length_groups", "2", "--train.steps", "10", "--train.micro_batch_size", "1")


@pytest.fixture(scope="module")
def few(tmp_path_factory) -> Path:
    """Shards of fewer samples than the run draws."""
    from medalign import phantom

    folder = tmp_path_factory.mktemp("few")
    report = phantom.write_phantoms(folder, 4, 1, 0)["train"]
    assert 20 <= report.written < 40
    return folder / "train"


def die_while_saving(recipe: Path, folder: Path, moment: str, step: str, *words: str) -> None:
    """Rank 0 kills itself at that moment; the other one is killed, wherever it is."""
    processes = start(["-m", "tests.e2e.dying", moment, step, *command(recipe, folder, words)[2:]], 2)
    try:
        processes[0].wait(timeout=TIMEOUT)
    finally:
        for process in processes:
            process.kill()
        output = processes[0].communicate()[0]
        processes[1].communicate()
    assert processes[0].returncode == -signal.SIGKILL, output


def test_killed_twice_while_it_saves_a_run_goes_on_exactly(recipe, few, tmp_path):
    """First step 6 is written and not renamed, so step 3 is gone on from; then step 9 is renamed and not the latest."""
    words = (*TWO, "--data.train", str(few))
    train(recipe, tmp_path / "whole", *words, world=2)
    folder = tmp_path / "killed"
    checkpoints = folder / "checkpoints"
    for moment, step, left, latest in (
        ("rename", "000006", ".partial-step-000006", "step-000003"),
        ("pointer", "000009", "step-000009", "step-000006"),
    ):
        die_while_saving(recipe, folder, moment, step, *words)
        assert (checkpoints / "latest").read_text().strip() == latest
        assert (checkpoints / left / "progress.json").is_file()
    output = train(recipe, folder, *words, world=2)[0]
    assert f"resuming from {checkpoints / 'step-000006'}" in output
    assert len(losses(folder)) == 10 and losses(folder) == losses(tmp_path / "whole")
    assert sorted(path.name for path in checkpoints.iterdir()) == ["latest", "step-000009", "step-000010"]


@pytest.fixture
def refused(recipe, monkeypatch, capsys):
    """What a run of one rank, in this process, says that ends with status 2."""

    def run(folder: Path, *words: str) -> str:
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
            monkeypatch.setenv(name, "")
            monkeypatch.delenv(name)
        assert main(command(recipe, folder, words)[2:]) == 2
        return capsys.readouterr().err

    return run


def test_a_failed_first_start_leaves_its_folder_free(refused, recipe, tmp_path):
    """Settings count from the first checkpoint on: those of a run that never had one bind nobody."""
    (tmp_path / "old").mkdir()
    old = config.dump(config.load(str(recipe), ["--train.lr", "0.1"]))
    (tmp_path / "old" / "config.yaml").write_text(old)
    assert "not a model folder" in refused(tmp_path / "old", "--student.path", "/nowhere")
    assert (tmp_path / "old" / "config.yaml").read_text() == old
    assert "not a model folder" in refused(tmp_path / "new", "--student.path", "/nowhere", "--train.lr", "0.5")
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["lock"]


def test_a_run_goes_on_with_its_own_stage_and_data_alone(refused, trained, few, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(trained, folder)
    settings = (folder / "config.yaml").read_text()
    assert "step-000008 has ZeRO stage 3" in refused(folder, "--engine.deepspeed", "zero2")
    assert "data.train is not what" in refused(folder, "--data.train", str(few))
    assert (folder / "config.yaml").read_text() == settings
