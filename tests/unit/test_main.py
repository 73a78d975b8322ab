"""The command's last words: a plain reason and an exit status, never a traceback."""

from __future__ import annotations

import errno

import pytest

from medalign import __main__ as command


def test_a_file_error_that_nobody_foresaw_is_a_plain_reason(monkeypatch, capsys):
    def full(_words):
        raise OSError(errno.ENOSPC, "No space left on device", "/runs/mine/metrics.jsonl")

    monkeypatch.setattr(command, "_train", full)
    assert command.main(["train", "phantom"]) == 2
    assert capsys.readouterr().err == "error: /runs/mine/metrics.jsonl: No space left on device\n"


def test_the_help_says_srun_as_the_readme_does(capsys):
    with pytest.raises(SystemExit):
        command.main(["train", "--help"])
    assert "srun --kill-on-bad-exit=1 python -m medalign train" in capsys.readouterr().out
