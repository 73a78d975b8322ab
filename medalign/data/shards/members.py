"""Names of a sample's members in a tar.

The key and a dot are followed by:

    jpg, png, ...        the first image; 0.jpg is also accepted
    1.jpg, 2.png, ...    further images, in order, without a gap
    json                 the annotation
    mask.png             the mask of the first image

Other tools add further members. Texts and labels are ignored, and so are arrays next to an image. A member with an
unknown name is rejected, because it may be an image.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from functools import lru_cache

from medalign.data.samples.bad_sample import short_name
from medalign.data.samples.sample import BadSample

ANNOTATION, MASK_PNG = "json", "mask.png"
MAX_IMAGES = 64  # per sample; each costs the student hundreds of tokens, so a larger number is a packing error

# The extension does not decide the format: an image whose content is not a supported format is rejected.
_IMAGE = re.compile(r"(?:([0-9]{1,6})\.)?(?:jpg|jpeg|jpe|jfif|png|dcm|dicom|webp|tiff?|bmp|gif|jp2|j2k|p[bgp]m)")
_TEXT = re.compile(
    r"(?:.*\.)?(?:txt|text|caption|transcript|label|cls2?|id|index|inx|key|url|csv|tsv|md|xml|html?|ya?ml|jsonl?|log)"
)
_ARRAY = re.compile(r"(?:.*\.)?(?:np[yz]|pth?|pyd|pkl|pickle|ten|tb|msg|msgpack|mp|cbor|h5|safetensors)")


def image_member(index: int, ending: str) -> str:
    """Return the member name of an image: "jpg" for index 0 (the first image), "2.jpg" for index 2."""
    return f"{index}.{ending}" if index else ending


def image_members(names: Iterable[str]) -> list[str]:
    """Return the names that are images, ordered by image index.

    Raises:
        BadSample: an image index is missing, occurs twice, or is not below MAX_IMAGES.
    """
    found: dict[int, str] = {}
    for name in names:
        index = _image_index(name)
        if index is not None and index in found:
            twice = ", ".join(sorted((found[index], name)))
            raise BadSample(f"image number {index} occurs twice ({twice})")
        if index is not None:
            found[index] = name
    last = max(found, default=-1)
    if last >= MAX_IMAGES:
        raise BadSample(f"image number {last} is too high; at most {MAX_IMAGES} images are read, counted from 0")
    missing = [str(index) for index in range(last) if index not in found]
    if missing:
        present = ", ".join(found[index] for index in sorted(found))
        raise BadSample(f"image number {', '.join(missing)} is missing; found {present}")
    return [found[index] for index in range(last + 1)]


def ignored_members(key: str, names: Collection[str]) -> list[str]:
    """Return the names that are known but not read: texts, labels, and arrays next to an image.

    Raises:
        BadSample: a name is unknown. It may be an image, and the sample must not be used without it.
    """
    has_image = any(map(is_image, names))  # without one, an array may be the image
    others = [name for name in names if not is_image(name) and name not in (ANNOTATION, MASK_PNG)]
    unknown = [name for name in others if not (_TEXT.fullmatch(name) or (has_image and _ARRAY.fullmatch(name)))]
    if unknown:
        raise BadSample(
            f"member {short_name(key)}.{short_name(unknown[0])} is not a supported image; name it jpg, png or dcm "
            f"(1.jpg, 2.png, ... for further images, {MASK_PNG} for a mask), or leave it out"
        )
    return others


def last_ending(name: str) -> str:
    """Return what follows the last dot: "png" for "left.png"."""
    return name.rpartition(".")[2]


def is_image(name: str) -> bool:
    """Return whether a member with this name is read as an image."""
    return _image_index(name) is not None


def may_be_image(name: str) -> bool:
    """Return whether a member with this name is or may be an image: an array, or a member with an unknown name."""
    return name != MASK_PNG and not _TEXT.fullmatch(name)


def has_dotted_names(names: Collection[str]) -> bool:
    """Return whether these members belong to several samples with dots in their names.

    For example, 1.2.840.7.jpg and 1.2.840.7.json share the key "1" with all their neighbors, because a key ends at the
    first dot.
    """
    stems = [name.removesuffix(f".{ANNOTATION}") for name in names if name.endswith(f".{ANNOTATION}")]
    stems = [stem for stem in stems if not is_image(stem)]  # jpg.json describes jpg
    others = [name for name in names if last_ending(name) != ANNOTATION and name != MASK_PNG]
    if ANNOTATION not in names and len(stems) > 1:
        return True
    return any(name == stem or name.startswith(f"{stem}.") for stem in stems for name in others)


@lru_cache(maxsize=1024)
def _image_index(name: str) -> int | None:
    match = _IMAGE.fullmatch(name)
    return int(match[1] or 0) if match else None
