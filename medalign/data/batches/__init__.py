"""From samples to batches: prompts, collation, loading."""
