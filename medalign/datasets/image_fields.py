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


def stated_images(row: Mapping[str, Any]) -> list[Any]:
    """Return the images of a line that must say whether it has any.

    Raises:
        BadSample: it does not, a name is empty rather than null, or the two fields name different images.
    """
    if "image" not in row and "images" not in row:
        raise BadSample("no image is named; write null for a question without an image")
    for name in ("image", "images"):
        value = row.get(name)
        if value is not None and not isinstance(value, list) and is_missing(value):
            raise BadSample(f"{name} is {value!r}; write a path, or null for a question without an image")
    return named_images(row)


def _listed(value: Any) -> list[Any]:
    if isinstance(value, list):
        return value
    return [] if is_missing(value) else [value]
