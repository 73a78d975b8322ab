"""Trains the packaged student and teacher. Each is run as a module from the checkout."""
