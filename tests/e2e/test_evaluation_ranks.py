"""Two ranks give the files of one, after interruptions on one rank and on two."""

from __future__ import annotations

import json
import re
import shutil
import socket
from pathlib import Path

import pytest

from medalign.__main__ import main
from medalign.student.model import Student
from tests.distributed.ranks import finish, start


def test_two_ranks_equal_one(trained: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One rank is interrupted in its third batch, then two ranks by a signal to one of them, and then two ranks end.

    The two ranks also ask the probes of the one rank.
    """
    run = shutil.copytree(trained, tmp_path / "run")
    words = ["evaluate", str(run), "--data", str(shards / "val"), "--batch-size", "2", "--max-new-tokens", "2"]
    words += ["--probes", "pope-random", "other", "--name"]
    assert main([*words, "one"]) == 0
    calls: list[int] = []
    answer = Student.generate

    def generate(self: Student, *arguments: object, **options: object) -> object:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return answer(self, *arguments, **options)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(Student, "generate", generate)
        assert main([*words, "two"]) == 130
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    outputs = finish(start(["-m", "tests.e2e.evaluating", str(port), *words, "two"], 2))
    assert all("first 143" in output and "second 0" in output for output in outputs), outputs
    total = len((shards / "val" / "index.jsonl").read_text().splitlines()) - 1
    assert f"resuming an interrupted evaluation after 4 of {total} samples" in outputs[0]
    stopped = re.search(rf"stopped after (\d+) of {total} samples", outputs[0])
    assert stopped and f"resuming an interrupted evaluation after {stopped[1]} of {total} samples" in outputs[0]
    answered = [int(re.search(r"answered (\d+)", output)[1]) for output in outputs]  # type: ignore[index]
    one, two = (run / "evaluation" / name for name in ("one", "two"))
    asked = [len((one / f"probe-{name}.jsonl").read_text().splitlines()) for name in ("pope-random", "other")]
    assert min(answered) >= 2 and sum(answered) == -(-total // 2) - 2 + sum(-(-count // 2) for count in asked)
    assert "closed" in outputs[0] and "closed" not in outputs[1]  # the table
    files = ["predictions.jsonl", "probe-other.jsonl", "probe-pope-random.jsonl", "scores.json"]
    assert sorted(path.name for path in two.iterdir()) == files
    assert all((one / name).read_bytes() == (two / name).read_bytes() for name in files[:3])
    first, second = (json.loads((folder / "scores.json").read_text()) for folder in (one, two))
    for scores in (first, second):
        del scores["name"], scores["provenance"]["command"]
    assert first == second
