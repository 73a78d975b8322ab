"""A run that went back before a spike has one history, and is resumed exactly."""

from __future__ import annotations

import json

from medalign import config
from medalign.inspection import list_keys
from medalign.observability.rows import read_rows
from tests.e2e.conftest import losses, train

WORDS = ("--train.max_diverged_steps", "1", "--train.rewind_on_spike", "1", "--losses.extra", "[tests.spikes.spike]")
COLUMNS = ("step", "train/rewinds", "data/skipped_batches", "train/diverged_steps")


def test_a_spike_is_left_out_and_the_run_is_resumed_exactly(recipe, tmp_path, monkeypatch):
    """Global batches 4 and 5 are NaN: the second ends in a rewind from step 6 to step 3, and step 4 takes batch 6."""
    folder, words = tmp_path / "run", (*WORDS, "--checkpoint.asynchronous", "true")
    batches = list_keys(config.load(str(recipe), ["--run.dir", str(folder)]), range(4, 6), 1, 0)
    monkeypatch.setenv("SPIKE_KEYS", json.dumps([key for _, keys in batches for key in keys]))
    (output,) = train(recipe, folder, *words)
    assert "The run goes back to" in output and "--keys --skip 3 --steps 6` lists their samples" in output
    assert [[row[name] for name in COLUMNS] for row in read_rows(folder / "metrics.jsonl")] == [
        *([step, 0, 0, 0] for step in (1, 2, 3)),
        *([step, 1, 3, 0] for step in (4, 5, 6, 7, 8)),
    ]
    whole = losses(folder)
    (folder / "checkpoints" / "latest").write_text("step-000006\n")
    (output,) = train(recipe, folder, *words)
    assert "resuming from" in output and len(whole) == 8 and losses(folder) == whole
