"""Images at several scales, and prompts that have some of the tokens of each.

Shape suffixes: R samples that are read, L tokens, I images, N image tokens of a scale, H heads, D width, T image tokens
of all samples.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from medalign.contracts import Batch
from medalign.decoding.contrast import take_tokens
from medalign.student.families.base import PatchAttention
from medalign.student.model import Student


@dataclass(frozen=True)
class Scale:
    """The images at one scale.

    Attributes:
        features_IND: what the language model reads.
        attention_INN: attention of patches to patches in the vision tower, a mean over heads and blocks, float32. None
            for the last scale.
    """

    features_IND: torch.Tensor
    attention_INN: torch.Tensor | None

    @property
    def side(self) -> int:
        """Tokens per side."""
        return math.isqrt(self.features_IND.shape[1])


class Piece(NamedTuple):
    """Image tokens that follow each other in a prompt: those of an image that are read at one scale."""

    image: int
    scale: int
    tokens: torch.Tensor  # which of the scale, int64


class Staged(NamedTuple):
    """Prompts with tokens of several scales, as `Student.read` takes them."""

    batch: Batch
    features_TD: torch.Tensor
    pieces: list[Piece]  # in the order of the tokens

    def split(self, values_RL: torch.Tensor) -> Iterator[tuple[Piece, torch.Tensor]]:
        """Yield each piece with the values at its tokens."""
        parts = values_RL[self.batch.image_index >= 0].split([len(piece.tokens) for piece in self.pieces])
        return zip(self.pieces, parts, strict=True)


@torch.no_grad()
def look(student: Student, pixels: torch.Tensor, count: int) -> list[Scale]:
    """Run the vision tower at several scales, from coarse to fine.

    Args:
        student: of a family with `patch_attention`.
        pixels: [I, 3, S, S].
        count: number of scales.
    """
    family, outputs = student.spec.family, dict[nn.Module, torch.Tensor]()
    source = family.patch_attention(student.spec)

    def keep(module: nn.Module, _inputs: Any, output: torch.Tensor) -> None:
        outputs[module] = output

    found: list[Scale] = []
    with ExitStack() as stack:
        for module in (module for pair in source.projections for module in pair):
            stack.callback(module.register_forward_hook(keep).remove)
        for features_IND in family.scaled_features(student.spec, pixels.to(student.dtype), count):
            last = len(found) == count - 1
            found.append(Scale(features_IND, None if last else _attention(source, outputs)))
    return found


def stage(batch: Batch, rows: Sequence[int], scales: Sequence[Scale], chosen: Sequence[torch.Tensor]) -> Staged:
    """Write prompts with the tokens of the first scales, one scale after another in the place of each image.

    Args:
        batch: left-padded prompts with the images' own tokens.
        rows: the samples to write.
        scales: all scales. The tokens of the last one are the cells of the batch.
        chosen: the tokens of each of the first scales that are read, bool [I, N].
    """
    pieces: list[Piece] = []
    places: list[torch.Tensor] = []
    for row in rows:
        parts, done = list[torch.Tensor](), int(batch.attention_mask[row].int().argmax())
        all_L = torch.arange(batch.input_ids.shape[1], device=batch.input_ids.device)
        index_L, cells_L = batch.image_index[row], batch.cells[row]
        for image in index_L[index_L >= 0].unique().tolist():
            run_L = index_L == image
            own = all_L[run_L]
            parts.append(all_L[done : own[0]])
            for number, tokens_IN in enumerate(chosen):
                piece = Piece(image, number, tokens_IN[image].nonzero().flatten())
                is_last = number == len(scales) - 1
                parts.append(all_L[run_L & cells_L][piece.tokens] if is_last else own[:1].expand(len(piece.tokens)))
                pieces.append(piece)
            done = int(own[-1]) + 1
        places.append(torch.cat([*parts, all_L[done:]]))
    features = [scales[piece.scale].features_IND[piece.image, piece.tokens] for piece in pieces]
    return Staged(take_tokens(batch, places, rows), torch.cat(features), pieces)


def _attention(source: PatchAttention, outputs: Mapping[nn.Module, torch.Tensor]) -> torch.Tensor:
    """Return the attention of patches to patches, [I, N, N]: the mean over heads and blocks."""
    means: list[torch.Tensor] = []
    for pair in source.projections:
        query_IHND, key_IHND = (
            outputs[module].float().unflatten(-1, (source.heads, -1)).transpose(1, 2) for module in pair
        )
        weights_IHNN = (query_IHND @ key_IHND.mT * query_IHND.shape[-1] ** -0.5).softmax(-1)
        weights_INN = weights_IHNN.mean(1)[:, source.first :, source.first :]
        means.append(weights_INN / weights_INN.sum(-1, keepdim=True))
    return torch.stack(means).mean(0)
