"""Measurement, ahead-of-time compilation, cost models and tuning of the kernels, behind `medalign bench kernels`."""
