"""Image placeholders in a text, written `<image>` as in LLaVA, and their comparison with the images of a sample."""

from __future__ import annotations

import re

from medalign.data.samples.bad_sample import BadSample

TAG = "<image>"
_AROUND = ("<im_start>", "<im_end>")  # LLaVA writes them before and after the placeholder
# Tokens of other models for images, video and audio: <ImageHere>, <|image_1|>, <image 1>, </img>, <im_patch>, ...
_FOREIGN = re.compile(
    r"<[|/]*\w*(?:image|img|im_patch|vision|video|audio)\w*[ -]?\d*\|?>|\[/?(?:IMG|IMAGE)(?:_\w+)?\]", re.IGNORECASE
)


def strip_tags(text: str) -> tuple[str, int]:
    """Remove the `<image>` placeholders from a text.

    Returns:
        The text, and the number of placeholders.

    Raises:
        BadSample: the text contains an image token of another model.
    """
    count = text.count(TAG)
    for token in (TAG, *_AROUND):
        text = text.replace(token, "")
    foreign = _FOREIGN.search(text)
    if foreign:
        raise BadSample(f"the text contains {foreign.group()!r}; write {TAG} as the placeholder of an image")
    return text, count


def check_count(tags: int, images: int) -> None:
    """Raise BadSample if the number of placeholders is neither 0 nor the number of images."""
    if tags and tags != images:
        named = "no image" if not images else "1 image" if images == 1 else f"{images} images"
        raise BadSample(f"the text contains {tags} {TAG}, but the sample has {named}")
