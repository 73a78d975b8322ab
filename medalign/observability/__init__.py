"""Metrics of a run: meters, sinks, and what may be logged."""
