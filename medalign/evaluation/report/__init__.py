"""The HTML report that compares runs, and views of a batch."""
