"""The operations that the benchmark covers."""

from __future__ import annotations

from medalign.benchmark.kernels.attention_map import cases as attention_map
from medalign.benchmark.kernels.case import KernelCase
from medalign.benchmark.kernels.token_similarity import cases as token_similarity
from medalign.errors import ConfigError

CASES = (token_similarity.CASE, attention_map.CASE)


def select_cases(name: str | None) -> tuple[KernelCase, ...]:
    """The case named `name`, or all cases for None. Raises ConfigError for an unknown name."""
    if name is None:
        return CASES
    found = tuple(case for case in CASES if case.name == name)
    if not found:
        raise ConfigError(f"{name}: no such kernel; choose one of {', '.join(case.name for case in CASES)}")
    return found
