"""Commands that are too long for `__main__`."""
