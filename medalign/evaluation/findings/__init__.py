"""What a chest report or a short answer says about findings: a labeler by rules, for English text."""

from medalign.evaluation.findings.labeler import Assertion, Label, Labeler, Mention, Reading, chest_labeler

__all__ = ["Assertion", "Label", "Labeler", "Mention", "Reading", "chest_labeler"]
