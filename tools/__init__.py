"""Programs that are run from the checkout and are not part of the package: `python -m tools.benchmarks.step`."""
