"""What the kernels are and do: compiled ahead of time, counted, measured, tuned. `medalign bench` prints it."""
