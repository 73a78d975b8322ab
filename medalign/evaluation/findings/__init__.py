"""What a chest report or a short answer says about findings: a labeller by rules, for English text."""

from medalign.evaluation.findings.labeller import Assertion, Label, Labeller, Mention, Reading, chest_labeller

__all__ = ["Assertion", "Label", "Labeller", "Mention", "Reading", "chest_labeller"]
