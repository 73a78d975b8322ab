"""tools/gpu_check.sh: the whole program at small sizes on the CPU, and its behavior if a stage fails."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tools.benchmarks.gpu_check import check

ROOT = Path(__file__).parents[2]
TABLES = [ROOT / "medalign" / "kernels" / name / "tile_table.json" for name in ("attention_map", "token_similarity")]


@pytest.mark.timeout(1200)  # a minute on two idle cores
def test_the_whole_program_on_the_cpu(tmp_path):
    packaged = [table.read_bytes() for table in TABLES]
    command = [sys.executable, "-m", "tools.benchmarks.gpu_check", "--tiny", "--output", tmp_path, "--minutes", "18"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    page = (tmp_path / "gpu_check.md").read_text()
    assert done.returncode == 0, done.stdout + page
    document = json.loads((tmp_path / "gpu_check.json").read_text())
    assert document["rehearsal"] and document["failed"] == [] and document["machine"]["card"] is None
    stages = {row["stage"]: row for row in document["stages"]}
    assert list(stages) == ["token similarity", "attention map", "training", "kernels", "step", "tiles"]
    for name in ("token similarity", "attention map"):
        assert {test["outcome"] for test in stages[name]["tests"]} == {"passed", "skipped"}
    assert {test["outcome"] for test in stages["training"]["tests"]} == {"skipped"}
    assert all("no CUDA device is there" in test["reason"] for test in stages["training"]["tests"])
    (kernels,) = stages["kernels"]["figures"].values()
    assert {row["path"] for row in kernels} == {"eager", "chunked", "triton"}
    assert_every_form_took_the_same_step(stages["step"]["figures"]["tiny"])
    assert [table.read_bytes() for table in TABLES] == packaged
    assert json.loads((tmp_path / "tables" / "attention_map.json").read_text()).keys() == {"sm_80", "sm_90", "sm_100"}
    for text in (
        "A rehearsal on the CPU",
        "everything passed",
        "teacher online",
        "Skipped tests",
        "gradient error",
    ):
        assert text in page


def assert_every_form_took_the_same_step(found):
    losses = {name: row["loss"] for name, row in found["forms"].items()}
    distilled = [loss for name, loss in losses.items() if name != "plain"]
    assert len(distilled) == 4 and losses["plain"] < min(distilled)
    assert max(distilled) - min(distilled) < 1e-5 * losses["plain"]  # float32 sums in another order
    assert all(row["seconds"] > 0 and row["mfu"] is None for row in found["forms"].values())
    assert found["peak_tflops"] == "not known for CPU: MFU is null"


def stage(name, code, limit=60, **more):
    return check.Stage(name, limit, ("-c", code), **more)


def run(monkeypatch, tmp_path, *stages, minutes="1"):
    machine = stage("machine", 'print(\'{"card": "NVIDIA Test"}\')')
    monkeypatch.setattr(check, "stages", lambda tiny, output: [machine, *stages])
    monkeypatch.setattr(sys, "argv", ["gpu_check", "--output", str(tmp_path), "--minutes", minutes])
    status = check.main()
    return status, json.loads((tmp_path / "gpu_check.json").read_text()), (tmp_path / "gpu_check.md").read_text()


def test_it_continues_after_a_failure_and_reports_it(monkeypatch, tmp_path, capsys):
    tested = 'import os; open(os.environ["GPU_CHECK_OUTCOMES"], "w").write(%r); raise SystemExit(1)'
    rows = [
        {"test": "t.py::good", "outcome": "passed", "seconds": 1},
        {"test": "t.py::bad", "outcome": "failed", "seconds": 1, "reason": "off by 2"},
    ]
    written = "import sys; open(sys.argv[-1], 'w').write('{\"on NVIDIA Test\": [{\"ms\": 1.5}]}')"
    status, document, page = run(
        monkeypatch,
        tmp_path,
        stage("tests", tested % "\n".join(map(json.dumps, rows)), tests=True),
        stage("broken", "raise RuntimeError('no such card')"),
        stage("kernels", written, figures="kernels.json"),
    )
    assert status == 1 and document["failed"] == ["tests", "broken"]
    assert [row["status"] for row in document["stages"]] == ["failed: status 1", "failed: status 1", "ok"]
    printed = capsys.readouterr().out
    for text in ("tests: `t.py::bad`: off by 2", "broken: failed: status 1"):
        assert f"FAILED {text}" in printed and f"- {text}" in page
    assert "RuntimeError: no such card" in page and "| 1.5 |" in page


def test_stages_find_the_packages_of_pythonpath(monkeypatch, tmp_path):
    """The check for missing packages finds them there, too."""
    (tmp_path / "carried.py").touch()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    status, document, _ = run(monkeypatch, tmp_path, stage("kernels", "import carried, medalign; print({})"))
    assert status == 0, document


def test_chosen_stages_keep_the_rows_of_the_others(monkeypatch, tmp_path):
    machine = stage("machine", 'print(\'{"card": "NVIDIA Test"}\')')
    written = "import sys; open(sys.argv[-1], 'w').write('{\"rows\": [{\"ms\": %s}]}')"
    for value in (1, 2):
        kernels, tiles = (stage(name, written % value, figures=f"{name}.json") for name in ("kernels", "tiles"))
        monkeypatch.setattr(check, "stages", lambda tiny, output, found=(kernels, tiles): [machine, *found])
        words = ["--stages", "tiles"] if value == 2 else []
        monkeypatch.setattr(sys, "argv", ["gpu_check", "--output", str(tmp_path), *words])
        assert check.main() == 0
    document = json.loads((tmp_path / "gpu_check.json").read_text())
    assert [row["figures"]["rows"][0]["ms"] for row in document["stages"]] == [1, 2]


def test_a_stage_out_of_time_is_killed_with_its_children_and_the_total_time_is_kept(monkeypatch, tmp_path):
    child = tmp_path / "child"
    forks = (
        "import subprocess, sys, time; p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']);"
        f"open({str(child)!r}, 'w').write(str(p.pid)); time.sleep(60)"
    )
    began = time.monotonic()
    status, document, page = run(
        monkeypatch,
        tmp_path,
        stage("slow", forks, limit=3),
        stage("after", "import time; time.sleep(60)"),
        stage("last", "print(1)"),
        minutes="0.2",
    )
    assert status == 1 and time.monotonic() - began < 40
    assert document["stages"][0]["status"] == "out of time: killed after 3 s"
    assert document["stages"][1]["status"].startswith("out of time: killed after")
    assert document["stages"][2]["status"] == "not run: no time left"
    assert "last: not run: no time left" in page
    state = Path(f"/proc/{child.read_text()}/stat")
    assert not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z"


def test_tests_that_are_all_skipped_on_a_gpu_are_a_failure(monkeypatch, tmp_path):
    skipped = json.dumps({"test": "t.py::one", "outcome": "skipped", "seconds": 0, "reason": "no CUDA"})
    code = f'import os; open(os.environ["GPU_CHECK_OUTCOMES"], "w").write({skipped!r})'
    status, document, _ = run(monkeypatch, tmp_path, stage("tests", code, tests=True))
    assert status == 1 and document["stages"][0]["status"] == "failed: every test was skipped"


def test_without_a_gpu_it_stops_at_once(monkeypatch, tmp_path, capsys):
    machine = stage("machine", "print('{\"card\": null}')")
    monkeypatch.setattr(check, "stages", lambda tiny, output: [machine, stage("next", "1/0")])
    monkeypatch.setattr(sys, "argv", ["gpu_check", "--output", str(tmp_path)])
    with pytest.raises(SystemExit) as stopped:
        check.main()
    assert stopped.value.code == 2 and "no CUDA device found" in capsys.readouterr().out


def test_missing_packages_are_listed(monkeypatch, capsys):
    monkeypatch.setattr(check, "NEEDED", "torch no_such_package")
    monkeypatch.setattr(sys, "argv", ["gpu_check", "--missing"])
    assert check.main() == 1
    assert "these packages are missing: no_such_package" in capsys.readouterr().err
    monkeypatch.setattr(check, "OLDEST", (4, 0))
    assert check.main() == 1
    assert "and 4.0 or newer is needed; set PYTHON=" in capsys.readouterr().err


def test_the_message_after_a_failed_installation_gives_the_remedy(tmp_path):
    (tmp_path / "tools").mkdir()
    for name in ("tools/gpu_check.sh", "tools/install.sh", "tools/constraints.txt", "setup.py"):
        shutil.copy(ROOT / name, tmp_path / name)
    done = subprocess.run(
        ["bash", "tools/gpu_check.sh"],
        cwd=tmp_path,
        env=os.environ | {"PYTHON": shutil.which("false")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert ".venv could not be created. Without internet access, run this in an environment" in done.stderr
