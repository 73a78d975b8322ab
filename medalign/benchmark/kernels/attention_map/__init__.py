"""The attention map for the benchmark."""
