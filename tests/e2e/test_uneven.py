"""A batch that the ranks cannot divide evenly: one rank runs empty micro-batches, with the losses of a single rank.

So it is with the samples packed.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.e2e.conftest import train


def losses(folder: Path) -> list[list[float]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [[row[name] for name in ("loss/language", "loss/similarity", "loss/attention")] for row in rows]


def test_two_ranks_share_three_samples(recipe: Path, tmp_path: Path) -> None:
    words = ["--train.batch_size", "3", "--train.micro_batch_size", "1", "--train.steps", "3", "--data.workers", "1"]
    words += ["--student.lora.dropout", "0"]  # its masks differ by rank
    train(recipe, tmp_path / "one", *words)
    one = losses(tmp_path / "one")
    for packing in ("false", "true"):
        train(recipe, tmp_path / packing, *words, "--data.packing", packing, world=2)
        two = losses(tmp_path / packing)
        assert len(one) == len(two) == 3
        # float32 sums in another order; the attention loss, where terms cancel, shows most of it.
        for alone, shared in zip(one, two, strict=True):
            assert alone == pytest.approx(shared, rel=1e-5)
