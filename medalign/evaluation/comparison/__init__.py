"""Paired comparison of several systems on the same samples."""

from medalign.evaluation.comparison.arms import Arm, read_arm
from medalign.evaluation.comparison.compare import Comparison, compare
from medalign.evaluation.comparison.table import format_comparisons

__all__ = ["Arm", "Comparison", "compare", "format_comparisons", "read_arm"]
