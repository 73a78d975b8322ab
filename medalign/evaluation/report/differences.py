"""Paired differences between the first arm of a report and the others, and whether they hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from medalign.errors import ConfigError, DataError
from medalign.evaluation.comparison import Arm as ComparedArm
from medalign.evaluation.comparison import Comparison, compare
from medalign.evaluation.comparison.arms import require_same_samples
from medalign.evaluation.comparison.measures import MEASURES
from medalign.evaluation.comparison.table import ALPHA
from medalign.evaluation.report.runs import Arm
from medalign.run_folder import EvaluationFolder


@dataclass(frozen=True)
class Difference:
    """The difference of one score to the baseline, in the unit of the tables."""

    comparison: Comparison

    @property
    def holds(self) -> bool:
        """Whether the p-value, adjusted for all tests on the data set, is below 0.05."""
        return self.comparison.p_holm < ALPHA

    @property
    def value(self) -> float:
        """The arm's score minus the baseline's."""
        return self._scaled(self.comparison.difference)

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval of the value."""
        return self._scaled(self.comparison.low), self._scaled(self.comparison.high)

    @property
    def text(self) -> str:
        """The value and its interval, such as "+3.9 [1.2, 6.6]"."""
        low, high = self.interval
        return f"{self.value:+.1f} [{low:.1f}, {high:.1f}]".replace("-", "\N{MINUS SIGN}")

    def _scaled(self, value: float) -> float:
        return value * MEASURES[self.comparison.metric].scale


@dataclass(frozen=True)
class Differences:
    """All paired differences on one data set.

    Attributes:
        baseline: title of the first arm; "" where nothing was to be compared.
        found: by the title of the arm and the key of the score.
        problems: why differences are missing.
    """

    baseline: str = ""
    found: Mapping[tuple[str, str], Difference] = field(default_factory=dict)
    problems: Sequence[str] = ()

    def of(self, arm: Arm, key: str) -> Difference | None:
        """Return the difference of an arm in one score; None for the first arm, or if it is missing."""
        return self.found.get((arm.title, key))

    @property
    def method(self) -> str:
        """How the intervals and p-values were computed; "" without any."""
        for one in self.found.values():
            unit, units = one.comparison.unit, one.comparison.units
            how = "t-interval and paired t-test over" if unit == "seed" else "bootstrap and permutation test over"
            samples = {"key": "samples"}.get(unit, f"{unit}s")
            return (
                f"{how} {units} {samples}, adjusted by Holm's method for the {len(self.found)} tests on this data set"
            )
        return ""


def find_differences(arms: Sequence[Arm], name: str, by: str = "image") -> Differences:
    """Compare every arm with the first one that was evaluated on a data set.

    An arm that was not measured on the same samples has no differences, and `problems` gives the reason.

    Args:
        arms: the arms of the report.
        name: the data set.
        by: what makes samples dependent: "image", "patient", or "key" for independent samples.
    """
    scored = [arm for arm in arms if arm.evaluations(name)]
    if len(scored) < 2:
        return Differences()
    unanswered = [arm.title for arm in scored if not all(one.predictions for one in arm.evaluations(name))]
    problems = [f"{title} has no file of predictions, so it is not compared" for title in unanswered]
    if scored[0].title in unanswered:
        return Differences(scored[0].title, problems=problems)
    baseline, *others = [_compared(arm, name) for arm in scored if arm.title not in unanswered]
    alike = []
    for arm in others:
        try:
            require_same_samples(baseline, arm)
        except (ConfigError, DataError) as error:
            problems.append(f"{arm.name} is not compared with {baseline.name}: {error}")
        else:
            alike.append(arm)
    try:
        found = compare([baseline, *alike], by) if alike else []
    except DataError as error:
        return Differences(baseline.name, problems=[*problems, f"the arms are not compared: {error}"])
    return Differences(baseline.name, {(one.arm, one.metric): Difference(one) for one in found}, problems)


def _compared(arm: Arm, name: str) -> ComparedArm:
    evaluations = arm.evaluations(name)
    return ComparedArm(
        arm.title,
        tuple(EvaluationFolder(one.folder).predictions for one in evaluations),
        tuple({(row.folder, row.key): row for row in one.predictions.values()} for one in evaluations),
    )
