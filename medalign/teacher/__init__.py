"""The teacher: a frozen vision tower, and the targets that it gives the student."""
