"""Token similarity for the benchmark."""
