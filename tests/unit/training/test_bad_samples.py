"""The loop counts bad samples over the whole run and stops it when they are too many."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from medalign.checkpoint.state import TrainState
from medalign.config import Config
from medalign.errors import DataError, DivergedError
from medalign.training.trainer import _check_finite, _update_state
from tests import tiny


def test_counts_go_on_after_a_resume_and_stop_the_run(caplog: pytest.LogCaptureFixture) -> None:
    config = Config()
    config.train.batch_size, config.data.max_skip_fraction = 50, 0.02
    good = tiny.batch()
    bad = replace(good, skipped=("train/shard-000001.tar/k7: checksum differs",), truncated=1)
    resumed = TrainState(step=3, samples=150, ranks=1, skipped=2, truncated=4)
    now, requests = _update_state(resumed, config, 4, [bad, good], torch.tensor([0.0, 1.0]))
    assert (now.step, now.samples, now.skipped, now.truncated) == (4, 200, 3, 5)
    assert requests == [0.0, 1.0]
    now, _ = _update_state(now, config, 5, [bad, good], torch.tensor([0.0, 1.0]))
    now, _ = _update_state(now, config, 6, [bad, bad], torch.tensor([0.0, 1.0]))  # 6 of 300 are 2 %, which is borne
    with pytest.raises(DataError, match=r"8 of 350 .*max_skip_fraction 0\.02.*shard-000001\.tar/k7.*"):
        _update_state(now, config, 7, [bad, bad], torch.tensor([0.0, 1.0]))


def test_a_loss_that_is_no_number_stops_the_run_and_names_the_samples() -> None:
    batch = tiny.batch()
    _check_finite({"loss/language": 1.0, "optim/grad_norm": 2.0}, 7, [batch])
    with pytest.raises(DivergedError, match=rf"step 7: optim/grad_norm is inf; .*train\.lr.*{batch.keys[0]}"):
        _check_finite({"loss/language": 1.0, "optim/grad_norm": float("inf")}, 7, [batch])
