"""The training of the packaged student and teacher, each run as a module from the checkout."""
