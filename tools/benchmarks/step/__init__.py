"""The cost of a training step with distillation, measured by `python -m tools.benchmarks.step`."""
