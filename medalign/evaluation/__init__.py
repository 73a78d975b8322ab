"""Evaluation of a trained student: answers, scores, grounding, and the report that compares runs."""
