"""Measurements of the package, each run as a module from the checkout, with their figures in `results/`."""
