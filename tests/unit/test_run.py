"""What a run refuses before it loads a model."""

from __future__ import annotations

import pytest

from medalign.config import Config
from medalign.errors import ConfigError
from medalign.losses.build import build_objective
from medalign.run import _require_metric


@pytest.mark.parametrize(("alpha", "metric"), [(1.0, "loss/similarity"), (1.0, "loss/attention"), (0.0, "loss/z_loss")])
def test_the_best_metric_is_a_loss_that_is_computed(alpha, metric):
    """With a teacher, a loss with coefficient 0 is computed too."""
    config = Config()
    config.student.path, config.losses.extra = "student", ["tests.own_loss.z_loss"]
    config.losses.alpha, config.losses.beta, config.train.best_metric = alpha, 0.0, metric
    _require_metric(config, build_objective(config))


@pytest.mark.parametrize("metric", ["loss/similarity", "loss/attention", "loss/own"])
def test_a_best_metric_that_no_validation_would_compute_is_refused(metric):
    config = Config()
    config.losses.alpha = config.losses.beta = 0.0
    config.train.best_metric = metric
    message = f"train.best_metric '{metric}' is not a loss of this run; use one of loss/total, loss/language$"
    with pytest.raises(ConfigError, match=message):
        _require_metric(config, build_objective(config))
