"""Tars and their index: writing, scanning, reading."""
