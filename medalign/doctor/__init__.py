"""Checks of a machine and of a recipe before a run: each finds one kind of fault, and states the remedy."""
