"""A hook for `json.loads` that rejects an object in which a field occurs twice; Python would keep the last one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from medalign.data.samples.bad_sample import BadSample, short_name


def unique_fields(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """Return the object. Raises BadSample if a field occurs twice."""
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise BadSample(f"field {short_name(twice)!r} occurs twice in one object; keep one of them")
    return fields
