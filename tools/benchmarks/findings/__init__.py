"""Precision and recall of the labeller of findings on labelled text."""
