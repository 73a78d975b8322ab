"""Scores of reports by models, through the packages of their authors, each in a process of its own."""

from medalign.evaluation.text_models.scores import TextModel, model_scores

__all__ = ["TextModel", "model_scores"]
