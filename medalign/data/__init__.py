"""Training data: shards, their storage, samples, their order, and batches."""
