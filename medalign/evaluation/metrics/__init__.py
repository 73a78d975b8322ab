"""Predictions of a run on a data set, and their scores."""

from medalign.evaluation.metrics.predictions import (
    Prediction,
    append_predictions,
    read_predictions,
    unfinished,
    write_predictions,
)
from medalign.evaluation.metrics.scores import score

__all__ = ["Prediction", "append_predictions", "read_predictions", "score", "unfinished", "write_predictions"]
