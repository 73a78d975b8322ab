"""The names of a sample's members in a tar.

After the key and its dot stands:

    jpg, png, ...        the first image; 0.jpg is read as the first, too
    1.jpg, 2.png, ...    its further images, in order, without a gap
    json                 the annotation
    mask.png             the mask of the first image

Other tools put further members beside these. Texts and labels are passed over, and so are arrays beside an image; what
may be an image under a name that is not known is refused.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from functools import lru_cache

from medalign.data.bad_sample import shown
from medalign.data.samples import BadSample

ANNOTATION, MASK_PNG = "json", "mask.png"
MOST_IMAGES = 64  # of one sample: each costs the student hundreds of tokens, so more are a slip in the packing

# What the endings promise is not relied on: an image of a format that is not read is refused by its content.
_IMAGE = re.compile(r"(?:([0-9]{1,6})\.)?(?:jpg|jpeg|jpe|jfif|png|dcm|dicom|webp|tiff?|bmp|gif|jp2|j2k|p[bgp]m)")
_TEXT = re.compile(
    r"(?:.*\.)?(?:txt|text|caption|transcript|label|cls2?|id|index|inx|key|url|csv|tsv|md|xml|html?|ya?ml|jsonl?|log)"
)
_ARRAY = re.compile(r"(?:.*\.)?(?:np[yz]|pth?|pyd|pkl|pickle|ten|tb|msg|msgpack|mp|cbor|h5|safetensors)")


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


def passed_over(key: str, names: Collection[str]) -> list[str]:
    """Those names that are known but not read: texts, labels, and arrays beside an image.

    Raises BadSample for a name that is not known: it may be an image, and the sample would be trained on without it.
    """
    arrays = any(map(is_image, names))  # else they may be the image
    others = [name for name in names if not is_image(name) and name not in (ANNOTATION, MASK_PNG)]
    unknown = [name for name in others if not (_TEXT.fullmatch(name) or (arrays and _ARRAY.fullmatch(name)))]
    if unknown:
        raise BadSample(
            f"member {shown(key)}.{shown(unknown[0])} is not an image that is read; name it jpg, png or dcm "
            f"(1.jpg, 2.png, ... for further images, {MASK_PNG} for a mask), or leave it out"
        )
    return others


def last_ending(name: str) -> str:
    """What stands behind the last dot: "png" of "left.png"."""
    return name.rpartition(".")[2]


def is_image(name: str) -> bool:
    """Whether a member of this name is read as an image."""
    return _number(name) is not None


def may_be_image(name: str) -> bool:
    """Whether a member of this name is an image, or may be one: an array, or of a name that is not known."""
    return name != MASK_PNG and not _TEXT.fullmatch(name)


def split_at_points(names: Collection[str]) -> bool:
    """Whether these are members of several samples, whose names hold points, as 1.2.840.7.jpg and 1.2.840.7.json do.

    All of them share what stands before the first point, where the key ends.
    """
    stems = [name.removesuffix(f".{ANNOTATION}") for name in names if name.endswith(f".{ANNOTATION}")]
    stems = [stem for stem in stems if not is_image(stem)]  # jpg.json tells of jpg
    others = [name for name in names if last_ending(name) != ANNOTATION and name != MASK_PNG]
    if ANNOTATION not in names and len(stems) > 1:
        return True
    return any(name == stem or name.startswith(f"{stem}.") for stem in stems for name in others)


@lru_cache(maxsize=1024)
def _number(name: str) -> int | None:
    match = _IMAGE.fullmatch(name)
    return int(match[1] or 0) if match else None
