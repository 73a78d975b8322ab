"""`medalign doctor` inside a job with two ranks."""

from __future__ import annotations

import json
import socket

import pytest

from medalign import phantom
from tests.distributed.ranks import finish, start


@pytest.fixture(scope="module")
def words(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("doctor")
    phantom.write_phantoms(folder, train=8, val=2, seed=0)
    run_dir = str(folder / "run")
    return ["doctor", "phantom", "--data.train", str(folder / "train"), "--run.dir", run_dir, "--json"]


def findings(output: str) -> dict[str, dict[str, str]]:
    return {one["name"]: one for one in json.loads(output[output.index("[\n") :])}


def test_rank_0_reports_for_all_and_ranks_reach_each_other(words):
    first, second = finish(start(["-m", "medalign", *words], 2))
    found = findings(first)
    assert found["ports"] == {
        "name": "ports",
        "status": "ok",
        "detail": "2 ranks, each reaches the next one",
        "remedy": "",
    }
    assert "on 2 ranks" in found["batch"]["detail"]
    assert "[\n" not in second


def test_a_fault_is_reported_with_rank_and_host_and_as_the_status(words):
    processes = start(["-m", "medalign", *words, "--losses.impl", "triton"], 2, TRITON_INTERPRET="0")
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [1, 0]
    kernels = findings(outputs[0])["kernels"]
    assert kernels["status"] == "error"
    assert kernels["detail"].startswith(f"rank 0 on {socket.gethostname()}: ")
    assert kernels["detail"].endswith("(and 1 other ranks)")
