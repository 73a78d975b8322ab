"""Counts of an evaluation, apart from its scores."""

from __future__ import annotations

import logging

import pytest

from medalign.distributed import log
from medalign.evaluation.metrics import Prediction
from medalign.evaluation.report.tables import remarks
from medalign.evaluation.tally import Tally


def row(key: str, folder: int = 0, finish_reason: str = "stop", size=(8, 8), prediction: str = "yes") -> Prediction:
    found = Prediction(key, "vqa", "Is there?", "yes", "closed", prediction, finish_reason, not prediction)
    found.folder, found.image_size = folder, size
    return found


@pytest.fixture
def tally() -> Tally:
    rows = [row("a"), row("b", finish_reason="length"), row("c", finish_reason="length", prediction="")]
    rows[0].truncated = rows[2].truncated = True
    return Tally([*rows, row("e", size=None, prediction=""), row("a", folder=1)], unreadable=1)


def test_counts(tally):
    assert tally.counts() == {
        "unreadable": 1,
        "truncated": 2,
        "answers_cut": 2,
        "answers_empty": 2,
        "without_image": 1,
        "duplicates": 1,
    }


def test_warnings_give_the_options(tally, caplog, monkeypatch):
    monkeypatch.setattr(log, "propagate", True)
    with caplog.at_level(logging.WARNING, logger=log.name):
        Tally([]).warn(64, 8)
        assert caplog.messages == []
        tally.warn(64, 8)
    assert caplog.messages == [
        "2 questions were truncated to 64 tokens; --max-length raises the limit",
        "2 of 5 answers were cut off at 8 tokens; --max-new-tokens raises the limit",
        "2 of 5 answers are empty",
    ]


def test_remarks_contain_every_count_that_is_not_zero(tally):
    facts = {"n": 5, "max_length": 64, "max_new_tokens": 8, "limit": 6, "samples": 9, "ungrounded": 1}
    lines = remarks(tally.counts() | facts)
    assert [line.split()[0] for line in lines[:-1]] == ["1", "2", "2", "2", "1", "1", "1"]
    assert "1 of 6 samples could not be read" in lines[0] and "--max-new-tokens" in lines[2]
    assert lines[-1] == "only the first 6 of 9 samples were evaluated (--limit)"
    assert remarks({"n": 5, "answers_cut": 0, "limit": 9, "samples": 9}) == []
