"""The places of images in a text, written `<image>` as in LLaVA, compared with the images of a sample."""

from __future__ import annotations

import re

from medalign.data.samples.bad_sample import BadSample

TAG = "<image>"
_AROUND = ("<im_start>", "<im_end>")  # LLaVA writes them on either side of the tag
# Other models' tokens for images, video and sound, as in <ImageHere>, <|image_1|>, <image 1>, </img>, <im_patch>.
_FOREIGN = re.compile(
    r"<[|/]*\w*(?:image|img|im_patch|vision|video|audio)\w*[ -]?\d*\|?>|\[/?(?:IMG|IMAGE)(?:_\w+)?\]", re.IGNORECASE
)


def strip_tags(text: str) -> tuple[str, int]:
    """The text without `<image>`, and how often it was there. Raises BadSample for another model's token."""
    count = text.count(TAG)
    for token in (TAG, *_AROUND):
        text = text.replace(token, "")
    foreign = _FOREIGN.search(text)
    if foreign:
        raise BadSample(f"the text holds {foreign.group()!r}; the place of an image is written {TAG}")
    return text, count


def check_count(tags: int, images: int) -> None:
    """Raises BadSample unless a text of so many tags is about so many images. A text without tags suits any number."""
    if tags and tags != images:
        named = (
            "no image is named" if not images else "1 image is named" if images == 1 else f"{images} images are named"
        )
        raise BadSample(f"{tags} {TAG} in the text, but {named}")
