"""A run that is killed several times, at any moment, ends with the losses of an uninterrupted run."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path

import pytest

from medalign import config
from medalign.__main__ import main
from tests.distributed.ranks import TIMEOUT, start
from tests.e2e.conftest import command, losses, train

# Two ranks with a loader process each, samples grouped by length, 1.7 epochs; checkpoints are written during steps.
TWO = (
    "--checkpoint.asynchronous",
    "true",
    "--data.workers",
    "1",
    "--data.length_groups",
    "2",
    "--train.steps",
    "10",
    "--train.micro_batch_size",
    "1",
)


@pytest.fixture(scope="module")
def few(tmp_path_factory) -> Path:
    """Shards with fewer samples than the run draws."""
    from medalign import phantom

    folder = tmp_path_factory.mktemp("few")
    report = phantom.write_phantoms(folder, 4, 1, 0)["train"]
    assert 20 <= report.written < 40
    return folder / "train"


def die_while_saving(recipe: Path, folder: Path, moment: str, step: str, *words: str) -> None:
    """Start a run in which rank 0 kills itself at this moment; then kill the other rank."""
    processes = start(["-m", "tests.e2e.dying", moment, step, *command(recipe, folder, words)[2:]], 2)
    try:
        processes[0].wait(timeout=TIMEOUT)
    finally:
        for process in processes:
            process.kill()
        output = processes[0].communicate()[0]
        processes[1].communicate()
    assert processes[0].returncode == -signal.SIGKILL, output


def test_a_run_killed_twice_while_saving_resumes_exactly(recipe, few, tmp_path):
    """First, step 6 is written but not renamed, so step 3 is resumed. Then, step 9 is renamed but not in `latest`."""
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
    """Train on one rank in this process, which must end with status 2, and return the message."""

    def run(folder: Path, *words: str) -> str:
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
            monkeypatch.setenv(name, "")
            monkeypatch.delenv(name)
        assert main(command(recipe, folder, words)[2:]) == 2
        return capsys.readouterr().err

    return run


def test_a_failed_first_start_leaves_its_folder_free(refused, recipe, tmp_path):
    """Settings are fixed from the first checkpoint on. Without one, a run can start again with other settings."""
    (tmp_path / "old").mkdir()
    old = config.dump(config.load(str(recipe), ["--train.lr", "0.1"]))
    (tmp_path / "old" / "config.yaml").write_text(old)
    assert "not a model folder" in refused(tmp_path / "old", "--student.path", "/nowhere")
    assert (tmp_path / "old" / "config.yaml").read_text() == old
    assert "not a model folder" in refused(tmp_path / "new", "--student.path", "/nowhere", "--train.lr", "0.5")
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["lock", "logs"]


def test_a_run_resumes_only_with_its_own_stage_and_data(refused, trained, few, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(trained, folder)
    settings = (folder / "config.yaml").read_text()
    assert "step-000008 has ZeRO stage 3" in refused(folder, "--engine.deepspeed", "zero2")
    assert "data.train is not what" in refused(folder, "--data.train", str(few))
    assert (folder / "config.yaml").read_text() == settings
