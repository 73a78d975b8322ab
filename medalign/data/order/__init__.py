"""The order of samples: which sample is used at which step."""
