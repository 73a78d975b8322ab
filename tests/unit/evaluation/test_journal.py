"""What an evaluation in progress leaves on disk, with any number of ranks."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

import pytest

from medalign.answering import _require_entries
from medalign.errors import ConfigError, DataError
from medalign.evaluation.batching import Place
from medalign.evaluation.generation import PredictionBatch
from medalign.evaluation.journal import Journal
from medalign.evaluation.metrics import Prediction


def answered(*keys: str, skipped: int = 0) -> PredictionBatch:
    rows = [Prediction(key, "vqa", "q?", "yes", "closed", "yes", attention=[0.123456]) for key in keys]
    return PredictionBatch(list(enumerate(rows)), ("reason",) * skipped)


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    return Journal(tmp_path / "predictions.jsonl", {"batch_size": 2, "top_p": 0.5})


def write(journal: Journal, rank: int, batches: dict[int, PredictionBatch], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", str(rank))
    with journal.writer() as append:
        for number, batch in batches.items():
            append(number, [Place(1, 2 * number), Place(1, 2 * number + 1)], batch)


def test_batches_of_several_ranks_are_resumed_by_one(journal, monkeypatch):
    assert journal.resume() == []
    write(journal, 0, {0: answered("a", "b"), 3: answered("g", skipped=1)}, monkeypatch)
    write(journal, 2, {1: answered("c", "d")}, monkeypatch)
    with journal._file(2).open("a") as file:
        file.write('{"batch": 2, "rows": [')  # killed while writing
    found = Journal(journal.path, {"batch_size": 2, "top_p": 0.5}).resume()
    assert [(entry.batch, entry.samples, entry.unreadable) for entry in found] == [(0, 2, 0), (1, 2, 0), (3, 2, 1)]
    assert [(place, row.key, row.folder) for place, row in found[2].rows] == [(Place(1, 6), "g", 1)]
    assert found[0].rows[0][1].attention == [0.1235]
    names = [".predictions.jsonl.rank-0", ".predictions.jsonl.settings"]
    assert sorted(path.name for path in journal.path.parent.iterdir()) == names
    write(journal, 1, {2: answered("e", "f")}, monkeypatch)
    assert [entry.batch for entry in journal.entries()] == [0, 1, 2, 3]
    journal.finish()
    assert list(journal.path.parent.iterdir()) == []


def test_other_settings_start_again(journal, monkeypatch, caplog):
    journal.resume()
    write(journal, 0, {0: answered("a", "b")}, monkeypatch)
    with caplog.at_level(logging.WARNING, "medalign"):
        assert Journal(journal.path, {"batch_size": 4, "top_p": 0.5}).resume() == []
    assert caplog.messages == ["an interrupted evaluation differs in batch_size; starting again"]
    assert not journal.entries()


@pytest.mark.parametrize("content", ["", "null", "[]"])
def test_damaged_settings_start_again(journal, monkeypatch, caplog, content):
    journal.resume()
    write(journal, 0, {0: answered("a", "b")}, monkeypatch)
    journal._settings_path.write_text(content)
    with caplog.at_level(logging.WARNING, "medalign"):
        assert journal.resume() == []
    assert "differs in settings that are not recorded" in caplog.text


def test_a_damaged_line_is_named(journal, monkeypatch):
    journal.resume()
    write(journal, 0, {0: answered("a", "b")}, monkeypatch)
    path = journal._file(0)
    path.write_text(path.read_text().replace('"batch": 0', '"batch'))
    with pytest.raises(DataError, match=r"rank-0, line 1 is damaged .*; remove the file"):
        journal.resume()


def test_answers_that_another_rank_has_written_elsewhere_are_missed(journal, monkeypatch):
    """As on folders that the nodes do not share: the scores would be those of fewer samples."""
    journal.resume()
    write(journal, 0, {0: answered("a", "b"), 2: answered("e")}, monkeypatch)
    _require_entries(journal.entries(), 2, journal.path)
    with pytest.raises(
        DataError, match=rf"{journal.path.parent}: the answers of 1 of 3 batches are not there.*all ranks"
    ):
        _require_entries(journal.entries(), 3, journal.path)


HOLDER = """
import sys, time
from pathlib import Path
from medalign.evaluation.journal import Journal
journal = Journal(Path(sys.argv[1]), {})
journal.resume()
print("held", flush=True)
sys.stdin.readline()
journal.finish()
print("free", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("end", ["finished", "killed"])
def test_a_second_process_is_refused_until_the_first_has_ended(journal, end):
    words = [sys.executable, "-c", HOLDER, str(journal.path)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout.readline() == "held\n"
        with pytest.raises(ConfigError, match=rf"another process is writing {journal.path}; .*--name or --output"):
            journal.resume()
        if end == "finished":
            first.stdin.write("\n")
            first.stdin.flush()
            assert first.stdout.readline() == "free\n"
            assert list(journal.path.parent.iterdir()) == []
        else:
            first.kill()
            first.wait()
        assert journal.resume() == []
        journal.finish()
        assert list(journal.path.parent.iterdir()) == []
        first.kill()
