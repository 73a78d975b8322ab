"""Synthetic chest radiographs with known ground truth, to check answers and attention."""

from medalign.phantom.contracts import KINDS, Finding, Question, Study
from medalign.phantom.records import records, write_phantoms
from medalign.phantom.studies import SPLITS, stream, study

__all__ = ["KINDS", "SPLITS", "Finding", "Question", "Study", "records", "stream", "study", "write_phantoms"]
