"""Samples to batches: prompts, collation, loading."""
