"""Checkpoints of a run, and exports of the trained student."""
