"""Tests and measurements of everything that needs a GPU, run by `tools/gpu_check.sh`."""
