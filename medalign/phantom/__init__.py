"""Synthetic chest radiographs: the test bed on which answers and attention can be checked against truth."""

from medalign.phantom.contracts import KINDS, Finding, Question, Study
from medalign.phantom.records import records, write
from medalign.phantom.studies import SPLITS, stream, study

__all__ = ["KINDS", "SPLITS", "Finding", "Question", "Study", "records", "stream", "study", "write"]
