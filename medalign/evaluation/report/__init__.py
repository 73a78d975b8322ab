"""The HTML report of runs and the page of a batch."""
