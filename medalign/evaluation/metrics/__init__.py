"""Predictions of a run on a data set, and their scores."""

from medalign.evaluation.metrics.predictions import (
    Prediction,
    read_predictions,
    write_predictions,
)
from medalign.evaluation.metrics.scores import score

__all__ = ["Prediction", "read_predictions", "score", "write_predictions"]
