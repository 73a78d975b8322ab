"""Ranks from the environment variables of launchers."""

from __future__ import annotations

import os

import pytest

from medalign import distributed
from medalign.errors import ConfigError, DataError, MedAlignError

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(autouse=True)
def bare(monkeypatch):
    """An environment without a launcher, restored after the test."""
    for name in (*NAMES, "SLURM_PROCID", "SLURM_NTASKS", "SLURM_STEP_NODELIST"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


def test_a_bare_start_is_one_rank():
    distributed.adopt_launcher()
    assert (distributed.rank(), distributed.world_size(), distributed.is_main()) == (0, 1, True)


def test_srun_variables_are_translated(monkeypatch):
    slurm = {"PROCID": "3", "NTASKS": "8", "LOCALID": "1", "STEP_NODELIST": "gpu[03-04,9],login", "JOB_ID": "123456"}
    for name, value in slurm.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    distributed.adopt_launcher()
    assert (distributed.rank(), distributed.world_size(), distributed.local_rank()) == (3, 8, 1)
    assert os.environ["MASTER_ADDR"] == "gpu03" and os.environ["MASTER_PORT"] == "23456"


def test_two_steps_of_a_job_have_different_ports(monkeypatch):
    """Both run on the first node of the job at the same time. A port that the user has set is kept."""
    slurm = {"PROCID": "0", "NTASKS": "2", "LOCALID": "0", "STEP_NODELIST": "gpu03", "JOB_ID": "123456"}
    for name, value in slurm.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    ports = []
    for step, given in (("0", ""), ("1", ""), ("1", "12345")):
        for name in NAMES:
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("SLURM_STEP_ID", step)
        if given:
            monkeypatch.setenv("MASTER_PORT", given)
        distributed.adopt_launcher()
        ports.append(os.environ["MASTER_PORT"])
    assert ports == ["23456", "24465", "12345"]


def test_a_batch_script_of_several_tasks_without_srun_is_an_error(monkeypatch):
    monkeypatch.setenv("SLURM_PROCID", "0")
    monkeypatch.setenv("SLURM_NTASKS", "8")
    with pytest.raises(
        ConfigError, match="has 8 tasks, but srun did not .*srun --kill-on-bad-exit=1 python -m medalign"
    ):
        distributed.adopt_launcher()


def test_a_single_rank_raises_its_own_error():
    with pytest.raises(DataError, match="lost"), distributed.raise_on_all_ranks():
        raise DataError("lost")
    with pytest.raises(MedAlignError, match="^/nowhere: No such file"), distributed.raise_on_all_ranks():
        open("/nowhere")  # noqa: SIM115
    with distributed.raise_on_all_ranks():
        pass


def test_the_variables_of_a_launcher_are_not_changed(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("SLURM_PROCID", "5")
    monkeypatch.setenv("SLURM_NTASKS", "9")
    distributed.adopt_launcher()
    assert (distributed.rank(), distributed.world_size()) == (1, 2)


@pytest.mark.parametrize(("nodes", "first"), [("a1", "a1"), ("a[1-3]", "a1"), ("n-[007,9],b", "n-007"), ("x,y", "x")])
def test_first_host(nodes, first):
    assert distributed.first_host(nodes) == first
