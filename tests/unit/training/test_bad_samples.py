"""The loop counts bad samples over the whole run and stops it when they are too many."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from medalign.checkpoint.state import TrainState
from medalign.config import Config, TrainConfig
from medalign.errors import DataError, DivergedError
from medalign.training.progress import count_if_diverged, loss_limit, update_state
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
TWO = TrainConfig(max_diverged_steps=2)
INFINITE = {"loss/total": 1.0, "optim/grad_norm": float("inf")}


def test_a_step_that_is_not_finite_is_counted_and_its_samples_are_logged(caplog) -> None:
    batch = tiny.batch()
    assert count_if_diverged(STATE, {"loss/total": 1.0, "optim/grad_norm": 2.0}, 7, [batch], TWO) == STATE
    assert not caplog.text
    assert count_if_diverged(STATE, INFINITE, 7, [batch], TWO).diverged == 2
    assert "step 7: optim/grad_norm is inf; its update is left out, on all ranks (2 of at most 2)" in caplog.text
    assert batch.keys[0] in caplog.text


def test_past_the_limit_the_run_stops_and_names_the_samples() -> None:
    batch = tiny.batch()
    with pytest.raises(DivergedError, match=rf"step 7: optim/grad_norm is inf; .*1 steps.*train\.lr.*{batch.keys[0]}"):
        count_if_diverged(STATE, INFINITE, 7, [batch], TrainConfig(max_diverged_steps=1))


def test_a_loss_that_is_not_finite_with_a_finite_gradient_stops_the_run_at_once() -> None:
    """DeepSpeed has made that update."""
    with pytest.raises(DivergedError, match="loss/total is nan"):
        count_if_diverged(STATE, {"loss/total": float("nan"), "optim/grad_norm": 1.0}, 7, [tiny.batch()], TrainConfig())


def test_a_loss_that_explodes_is_left_out_and_does_not_shift_the_limit(caplog) -> None:
    """The median of 20 losses of 2 is 2, so 3 times that is the limit; it holds from the 20th step on."""
    config, state = TrainConfig(max_loss_ratio=3.0), TrainState(step=0, samples=0, ranks=1)
    for step in range(1, 21):
        assert loss_limit(state, config.max_loss_ratio) == math.inf
        state = count_if_diverged(state, {"loss/total": 2.0, "optim/grad_norm": 1.0}, step, [], config)
    assert loss_limit(state, config.max_loss_ratio) == 6.0 and len(state.losses) == 20
    after = count_if_diverged(state, {"loss/total": 7.0, "optim/grad_norm": math.inf}, 21, [tiny.batch()], config)
    assert after == replace(state, diverged=1, spike=(21, 21))
    assert (
        "step 21: loss/total is 7, and at most 6 follows from the last 20 steps; its update is left out" in caplog.text
    )
    assert loss_limit(state, None) == math.inf
