"""Faults injected into a small run at random moments, and proof that it continues exactly: `python -m tools.faults`."""
