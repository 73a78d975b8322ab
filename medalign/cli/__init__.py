"""The command line: one file per command, each with `register` and `run`, and `main`, which combines them.

The file of a command imports libraries inside `run`, so that `medalign --help` loads neither torch nor a model library.
"""
