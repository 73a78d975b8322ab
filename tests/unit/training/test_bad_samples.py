"""The loop counts bad samples over the whole run and stops it when they are too many."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from medalign.checkpoint.state import TrainState
from medalign.config import Config
from medalign.errors import DataError, DivergedError
from medalign.training.progress import count_if_diverged, update_state
from tests import tiny


def test_counts_go_on_after_a_resume_and_stop_the_run(caplog: pytest.LogCaptureFixture) -> None:
    config = Config()
    config.train.batch_size, config.data.max_skip_fraction = 50, 0.02
    good = tiny.batch()
    bad = replace(good, skipped=("train/shard-000001.tar/k7: checksum differs",), truncated=1)
    resumed = TrainState(step=3, samples=150, ranks=1, skipped=2, truncated=4)
    now, requests = update_state(resumed, config, 4, [bad, good], torch.tensor([0.0, 1.0]))
    assert (now.step, now.samples, now.skipped, now.truncated) == (4, 200, 3, 5)
    assert requests == [0.0, 1.0]
    now, _ = update_state(now, config, 5, [bad, good], torch.tensor([0.0, 1.0]))
    now, _ = update_state(now, config, 6, [bad, bad], torch.tensor([0.0, 1.0]))  # 6 of 300 are 2 %, which is borne
    with pytest.raises(DataError, match=r"8 of 350 .*max_skip_fraction 0\.02.*shard-000001\.tar/k7.*"):
        update_state(now, config, 7, [bad, bad], torch.tensor([0.0, 1.0]))


STATE = TrainState(step=6, samples=24, ranks=1, diverged=1)
INFINITE = {"loss/language": 1.0, "optim/grad_norm": float("inf")}


def test_a_step_that_is_not_finite_is_counted_and_its_samples_are_logged(caplog) -> None:
    batch = tiny.batch()
    assert count_if_diverged(STATE, {"loss/language": 1.0, "optim/grad_norm": 2.0}, 7, [batch], 2) == STATE
    assert not caplog.text
    assert count_if_diverged(STATE, INFINITE, 7, [batch], 2).diverged == 2
    assert "step 7: optim/grad_norm is inf; its update is left out, on all ranks (2 of at most 2)" in caplog.text
    assert batch.keys[0] in caplog.text


def test_past_the_limit_the_run_stops_and_names_the_samples() -> None:
    batch = tiny.batch()
    with pytest.raises(DivergedError, match=rf"step 7: optim/grad_norm is inf; .*1 steps.*train\.lr.*{batch.keys[0]}"):
        count_if_diverged(STATE, INFINITE, 7, [batch], 1)


def test_a_loss_that_is_not_finite_with_a_finite_gradient_stops_the_run_at_once() -> None:
    """DeepSpeed has made that update."""
    with pytest.raises(DivergedError, match="loss/language is nan"):
        count_if_diverged(STATE, {"loss/language": float("nan"), "optim/grad_norm": 1.0}, 7, [tiny.batch()], 100)
