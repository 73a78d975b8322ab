"""The kernels measured, compiled ahead of time and tuned, behind `medalign bench`."""
