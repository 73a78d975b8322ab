"""`medalign bench kernels`: measurement, ahead-of-time compilation, cost models and tuning of the kernels."""
