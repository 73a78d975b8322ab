"""Targets on disk: what a teacher sees in each image, written once and read instead of running its tower."""
