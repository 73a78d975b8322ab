"""Probes: the questions of an evaluation asked again under other conditions, and questions about known findings."""
