"""Tar shards and their index: writing, scanning and reading."""
