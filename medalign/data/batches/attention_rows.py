"""Rows of the attention loss other than the prompt's tokens: those that the released code takes."""

from __future__ import annotations

from typing import Any

from medalign.data.batches.prompts import Encoded


def official_rows(encoded: Encoded, tokenizer: Any) -> list[bool]:
    """One bool per token: True after the last image, up to and including the last token that holds a ":".

    The colon is looked for in prompt and answer together, as the released code does: an answer with a colon takes part
    up to there. All False without an image, or without a colon after it.
    """
    ids = encoded.input_ids
    start = 1 + max((place for place, image in enumerate(encoded.image_index) if image >= 0), default=len(ids) - 1)
    tokens = tokenizer.convert_ids_to_tokens(ids[start:])
    end = start + 1 + max((place for place, token in enumerate(tokens) if ":" in token), default=-1)
    return [start <= place < end for place in range(len(ids))]
