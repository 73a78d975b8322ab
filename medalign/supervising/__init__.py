"""Starts a training again after a crash, within bounds."""
