"""The command line: a file per command, each with `register` and `run`; `main` puts them together.

A command's file imports what its `run` needs inside `run`, so that `medalign --help` loads neither torch nor a model
library.
"""
