"""Several views of the same prompts in one generation: each is read in a pass of its own, and all continue together.

A view may depend on what an earlier one has left, without a pass more than there are views. The rows of the generation
are those of the first view, then those of the second, and so on.

Shape suffixes: B samples, V views, L tokens, T tokens that a view reads.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F

from medalign.contracts import Batch
from medalign.student.capture import AttentionCapture
from medalign.student.query_mixture import QueryMixture

Arguments = dict[str, Any]
Forward = Callable[..., Any]
View = Callable[[Forward, Arguments], Any]
"""Takes the language model's forward pass and its arguments for the B prompts; returns what the pass returns."""

_ROWS = {"inputs_embeds": 0, "attention_mask": 0, "position_ids": -2, "visual_pos_masks": 0}  # dimension of the rows
_TOKENS = {"inputs_embeds": 1, "position_ids": -1, "cache_position": 0}  # dimension of the tokens of a pass
_FEATURES = "deepstack_visual_embeds"  # of Qwen3-VL: [T, D] each, for the image tokens of all rows


def repeated(batch: Batch, times: int) -> Batch:
    """Return what a model reads of a batch whose prompts it reads several times."""
    if times == 1:
        return batch
    return replace(
        batch,
        input_ids=batch.input_ids.repeat(times, 1),
        attention_mask=batch.attention_mask.repeat(times, 1),
        image_index=batch.image_index.repeat(times, 1),
        student_pixels=batch.student_pixels.repeat(times, 1, 1, 1),
    )


@contextmanager
def reading_views(
    language: Any,
    views: Sequence[View],
    prompt: int,
    captures: Sequence[AttentionCapture],
    mixture: QueryMixture | None,
) -> Iterator[None]:
    """Inside the context, the language model reads prompts of V B rows by one view after another, of B rows each.

    The attention that is captured is that of the first view.

    Args:
        language: the language model.
        views: in the order of the rows; none changes nothing.
        prompt: L of the prompts, padding included; a pass of another length is left alone.
        captures: those of the blocks, which record the B rows of a view.
        mixture: that of the student, which decides for the B rows of a view.
    """
    if not views:
        yield
        return
    forward: Forward = language.forward

    def read(**arguments: Any) -> Any:
        if arguments["inputs_embeds"].shape[1] != prompt:
            return forward(**arguments)
        cache = arguments["past_key_values"]  # empty so far
        outputs, caches, attentions, gates = [], [], [], list[Any]()
        for place, view in enumerate(views):
            caches.append(copy.deepcopy(cache))
            outputs.append(view(forward, _rows(arguments, place, len(views)) | {"past_key_values": caches[-1]}))
            attentions.append([capture.attention for capture in captures])
            if mixture is not None:
                gates.append(mixture.decided)
        for capture, attention in zip(captures, attentions[0], strict=True):
            capture.attention = attention
        if mixture is not None:
            mixture.decided = torch.cat(gates)
        _join(cache, caches)
        found = outputs[0]
        found.last_hidden_state = torch.cat([output.last_hidden_state for output in outputs])
        found.past_key_values = cache
        return found

    language.forward = read  # hides the method of the class
    try:
        yield
    finally:
        del language.forward


def read_rest(
    forward: Forward,
    arguments: Arguments,
    earlier: Any,
    changed_BL: torch.Tensor,
    start: int,
) -> Any:
    """Read a view that differs from an earlier one only at some tokens, from the first of them on.

    For a language model without image features between its blocks (Qwen3-VL has them). Wherever nothing changes, keys
    and values are those of the earlier view: the caller sees to it within the pass, this function in the cache.

    Args:
        forward: the language model's forward pass.
        arguments: those for the B prompts, with an empty cache.
        earlier: the cache of the earlier view.
        changed_BL: True at tokens that differ.
        start: number of tokens that are not read.

    Returns:
        What the pass returns. The hidden states before `start` are zero.
    """
    cache = arguments["past_key_values"]
    for block, layer in enumerate(earlier.layers):
        cache.update(layer.keys[:, :, :start], layer.values[:, :, :start], block)
    rest = dict(arguments)
    for name, dimension in _TOKENS.items():
        value = rest.get(name)
        if value is not None:
            rest[name] = value.narrow(dimension, start, value.shape[dimension] - start)
    found = forward(**rest)
    changed_B1T1 = changed_BL[:, None, start:, None]
    for layer, before in zip(cache.layers, earlier.layers, strict=True):
        for mine, its in ((layer.keys, before.keys), (layer.values, before.values)):
            mine[:, :, start:] = mine[:, :, start:].where(changed_B1T1, its[:, :, start:])
    found.last_hidden_state = F.pad(found.last_hidden_state, (0, 0, start, 0))
    return found


def _rows(arguments: Arguments, place: int, views: int) -> Arguments:
    """Return the arguments of a pass for the rows of one view."""
    count = len(arguments["inputs_embeds"]) // views

    def part(value: Any, dimension: int) -> Any:
        if isinstance(value, dict):  # masks by kind of attention
            return {kind: part(mask, dimension) for kind, mask in value.items()}
        if value is None or value.shape[dimension] == 1 != count * views:  # the same for all rows
            return value
        return value.narrow(dimension, place * count, count)

    found = {name: part(value, _ROWS[name]) if name in _ROWS else value for name, value in arguments.items()}
    if found.get(_FEATURES) is not None:  # the views have the same images
        found[_FEATURES] = [features.chunk(views)[place] for features in found[_FEATURES]]
    return found


def _join(cache: Any, caches: Sequence[Any]) -> None:
    """Fill a cache with the rows of others."""
    cache.layers = caches[0].layers
    for layer, *others in zip(*(each.layers for each in caches), strict=True):
        layer.keys = torch.cat([layer.keys, *(other.keys for other in others)])
        layer.values = torch.cat([layer.values, *(other.values for other in others)])
