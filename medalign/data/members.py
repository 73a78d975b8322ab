"""The names of a sample's members in a tar.

After the key and its dot stands:

    jpg, png, ...        the first image; 0.jpg is read as the first, too
    1.jpg, 2.png, ...    its further images, in order, without a gap
    json                 the annotation
    mask.png             the mask of the first image
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache

from medalign.data.samples import BadSample

ANNOTATION, MASK_PNG = "json", "mask.png"
MOST_IMAGES = 64  # of one sample: each costs the student hundreds of tokens, so more are a slip in the packing

_IMAGE = re.compile(r"(?:([0-9]{1,6})\.)?(?:jpg|jpeg|png|dcm)")


def image_member(number: int, ending: str) -> str:
    """ "jpg" for the first image, number 0, and "2.jpg" for the third."""
    return f"{number}.{ending}" if number else ending


def image_members(names: Iterable[str]) -> list[str]:
    """Those names that are images, in the order of their numbers.

    Raises BadSample for a number that is missing, that two have, or that is beyond MOST_IMAGES.
    """
    found: dict[int, str] = {}
    for name in names:
        number = _number(name)
        if number is not None and number in found:
            twice = ", ".join(sorted((found[number], name)))
            raise BadSample(f"image number {number} is there twice ({twice})")
        if number is not None:
            found[number] = name
    last = max(found, default=-1)
    if last >= MOST_IMAGES:
        raise BadSample(f"image number {last} is too high; at most {MOST_IMAGES} are read, counted from 0")
    missing = [str(number) for number in range(last) if number not in found]
    if missing:
        there = ", ".join(found[number] for number in sorted(found))
        raise BadSample(f"image number {', '.join(missing)} is missing beside {there}")
    return [found[number] for number in range(last + 1)]


@lru_cache(maxsize=1024)
def _number(name: str) -> int | None:
    match = _IMAGE.fullmatch(name)
    return int(match[1] or 0) if match else None
