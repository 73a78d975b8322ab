"""Precision and recall of the labeler of findings on labeled text."""
