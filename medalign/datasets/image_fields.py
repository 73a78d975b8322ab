"""Fields under which annotations of other tools name the images of a sample."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from medalign.data.samples.sample import BadSample
from medalign.datasets.texts import is_missing


def named_images(row: Mapping[str, Any]) -> list[Any]:
    """Return the images named in "image" or "images", each one name or a list. Raises BadSample if they differ."""
    one, several = (_listed(row.get(name)) for name in ("image", "images"))
    if one and several and one != several:
        raise BadSample('"image" and "images" name different images')
    return one or several


def _listed(value: Any) -> list[Any]:
    if isinstance(value, list):
        return value
    return [] if is_missing(value) else [value]
