"""Rows of the attention loss as the original code selects them, as an alternative to the tokens of the prompt."""

from __future__ import annotations

from typing import Any

from medalign.data.batches.prompts import Encoded


def official_rows(encoded: Encoded, tokenizer: Any) -> list[bool]:
    """Select the tokens after the last image, up to and including the last token that contains a ":".

    Like the original code, this searches for the colon in prompt and answer, so an answer with a colon is included
    up to the colon.

    Args:
        encoded: the sample as tokens.
        tokenizer: the tokenizer of the student.

    Returns:
        One bool per token. All are False without an image, or without a colon after it.
    """
    ids = encoded.input_ids
    start = 1 + max(
        (position for position, image in enumerate(encoded.image_index) if image >= 0), default=len(ids) - 1
    )
    tokens = tokenizer.convert_ids_to_tokens(ids[start:])
    end = start + 1 + max((position for position, token in enumerate(tokens) if ":" in token), default=-1)
    return [start <= position < end for position in range(len(ids))]
