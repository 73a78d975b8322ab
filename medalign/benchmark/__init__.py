"""Benchmarks of the package's own code, behind `medalign bench`."""
