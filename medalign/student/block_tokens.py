"""The visual tokens at the input of every block. An instrument: the training taps only the blocks it distils.

Shape suffixes: B samples, L tokens, I images, N cells per image, D hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from medalign.contracts import Batch
from medalign.geometry import gather_images
from medalign.student.model import Student


class BlockTokens(NamedTuple):
    """The visual tokens at the input of a block. A block with W has two entries: before W and after."""

    block: int
    steered: bool
    tokens_IND: torch.Tensor  # float32


@torch.no_grad()
def block_tokens(student: Student, batch: Batch) -> list[BlockTokens]:
    """Run the student once, and return the tokens at the input of every block, in their order.

    Args:
        student: in evaluation mode.
        batch: padded, with at least one image.
    """
    inputs: dict[tuple[int, bool], torch.Tensor] = {}
    with ExitStack() as stack:
        for block, module in enumerate(student.spec.blocks):
            stack.enter_context(_hook(module, partial(_keep, inputs, (block, False)), first=True))
            if student.steering is not None and block in student.layers:
                stack.enter_context(_hook(module, partial(_keep, inputs, (block, True)), first=False))
        student(batch, tap=False)
    images, cells = len(batch.image_weight), student.spec.grid.size
    return [
        BlockTokens(*place, gather_images(hidden_BLD, batch.cells, images, cells).float())
        for place, hidden_BLD in sorted(inputs.items())
    ]


def _keep(
    inputs: dict[tuple[int, bool], torch.Tensor],
    place: tuple[int, bool],
    _module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> None:
    inputs[place] = args[0] if args else kwargs["hidden_states"]


@contextmanager
def _hook(module: nn.Module, hook: Any, *, first: bool) -> Iterator[None]:
    """Call the hook before the module inside the context: before the hook that applies W if `first`, else after it."""
    handle = module.register_forward_pre_hook(hook, with_kwargs=True, prepend=first)
    try:
        yield
    finally:
        handle.remove()
