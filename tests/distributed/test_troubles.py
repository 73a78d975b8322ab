"""A failure on one of two ranks ends both with the same error, and keeps earlier checkpoints."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from medalign.checkpoint import export
from tests import tiny
from tests.distributed.ranks import run_worker


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("troubles")


@pytest.fixture(scope="module")
def ranks(folder, student_folder, teacher_folder) -> list[dict[str, Any]]:
    settings = {"student": str(student_folder), "teacher": str(teacher_folder), "folder": str(folder)}
    return run_worker("troubles", settings, 2, folder / "ranks", module="troubled")


def both(ranks: list[dict[str, Any]], *path: str) -> Any:
    """Return the result at this path, which must be the same on both ranks."""
    one, other = ranks
    for name in path:
        one, other = one[name], other[name]
    assert one == other
    return one


def test_all_raise_the_error_of_one(ranks):
    assert both(ranks, "together") == "DataError: rank 1: naïve: a shard is lost"


def test_damage_found_by_one_rank_makes_all_ranks_take_the_checkpoint_before(ranks):
    assert both(ranks, "latest") == {"whole": "/step-000002", "damaged": "/step-000001"}


def test_a_shard_that_one_rank_loses_ends_all(ranks):
    """The shard is lost before the second step, so step 1 is the last checkpoint."""
    found = both(ranks, "lost shard")
    assert found == {"raised": "DataError: rank 1: train/shard-000001.tar is gone", "saved": [1]}


def test_a_loss_that_is_not_finite_ends_all_ranks_and_is_never_saved(ranks):
    for rank in ranks:
        assert rank["diverged"]["saved"] == [1]
        assert rank["diverged"]["raised"].startswith("DivergedError: step 2: loss/language is nan")


def test_a_step_above_its_loss_limit_updates_nothing(ranks):
    assert both(ranks, "exploded") == {"above": "same, False", "below": "changed, True"}


def test_a_step_that_is_not_finite_updates_nothing_and_the_run_continues(ranks):
    assert both(ranks, "left out") == {"raised": "nothing", "saved": [1, 2, 3], "finite": True}


@pytest.mark.parametrize("trouble", ["rank 0 full", "rank 1 full", "export full", "no folder"])
def test_a_disk_failure_on_one_rank_ends_all_ranks(ranks, trouble):
    shown = both(ranks, "checkpoints", trouble)
    assert re.fullmatch(r"CheckpointError: (rank 1: )?checkpoint .*step-000002 could not be written \(.+\); .*", shown)


def test_failures_leave_the_earlier_checkpoint_and_an_engine_that_can_save_again(ranks):
    assert both(ranks, "checkpoints", "left") == ["file", "latest", "step-000001"]
    assert both(ranks, "checkpoints", "after") == "step-000002"


def test_a_checkpoint_that_was_written_during_steps_is_that_of_its_moment(ranks):
    """The two steps after it, taken while it was written, are repeated to the last bit."""
    assert both(ranks, "background", "folder") == both(ranks, "background", "whole") == "step-000001"
    assert both(ranks, "background", "first") == both(ranks, "background", "second")


def test_a_disk_that_fills_on_one_rank_in_the_background_is_an_error_of_all(ranks):
    shown = both(ranks, "background", "raised")
    assert re.fullmatch(r"CheckpointError: rank 1: checkpoint .*step-000002 could not be written \(.+\); .*", shown)


def test_a_spike_is_left_out_by_going_back_twice(ranks):
    """Two steps may diverge at a time, so batches 4 and 5 are left out first, then 6 and 7."""
    assert both(ranks, "rewound", "states") == [[0, 0, 0], [4, 1, 2], [4, 2, 4], [8, 2, 4]]
    assert both(ranks, "rewound", "latest") == "step-000004"
    for rank in ranks:
        assert re.search(r"DivergedError: step 6: .* The run has gone back 1 times before", rank["rewound"]["bound"])


@pytest.mark.parametrize("other", ["again from 2", "again from 6", "plain"])
def test_a_run_with_rewinds_is_repeated_exactly(ranks, other):
    """Resumed before and after the rewinds, and trained on the same batches without a spike: the same parameters."""
    assert both(ranks, "rewound", "whole") == both(ranks, "rewound", other)


def test_an_export_contains_the_trained_values_of_the_sharded_student(ranks, folder):
    assert ranks[0]["export"] == {"names": [], "differ": [], "still": []}
    student = export.load_export(folder / "export", torch.float32, torch.device("cpu"))
    with torch.no_grad():
        logits = student(tiny.batch(), tap=False).logits
    in_memory = load_file(folder / "export" / "in_memory.safetensors")["logits"]
    torch.testing.assert_close(logits, in_memory, rtol=1e-6, atol=1e-6)
