"""Contrast of two views of a sample: the logits of the first, corrected by those of a degraded second one.

Both views are rows of one batch, so a generation has 2 B rows and one cache. After each pass, both rows of a sample
get the scores of the contrast, so both continue with the same token. A sample without an image has nothing to degrade:
it is decoded as without a contrast.

The adaptive plausibility constraint (Li et al., "Contrastive Decoding", arXiv 2210.15097) leaves the tokens whose
probability in the first view is at least beta times that of the most probable one. A logit differs from the log
probability by a constant of its row, so the constraint is computed on logits.

Shape suffixes: B samples, L tokens, V vocabulary size, I images.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from medalign.contracts import IGNORE, Batch
from medalign.decoding.base import Decoding, Method, Prepared
from medalign.student.model import Student

NO_BEAMS = "beams add log probabilities, and the scores of a contrast are not log probabilities"

Combine = Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]


@dataclass(frozen=True)
class Contrast(Method):
    """A method that compares the image with a second view. A subclass makes the view and combines the logits."""

    beams: ClassVar[str] = NO_BEAMS

    @abstractmethod
    def second_view(self, student: Student, batch: Batch, decoding: Decoding) -> AbstractContextManager[Batch]:
        """Return a context manager that yields the second view of the samples, row by row, left-padded.

        Args:
            student: the student.
            batch: the first view; at least one sample has an image.
            decoding: the settings of generation.
        """

    @abstractmethod
    def combine(self, first_BV: torch.Tensor, second_BV: torch.Tensor, step: int) -> torch.Tensor:
        """Return the scores of the next token, [B, V].

        Args:
            first_BV: logits of the first view.
            second_BV: logits of the second view.
            step: number of tokens that were generated before.
        """

    @contextmanager
    def applied(self, student: Student, batch: Batch, decoding: Decoding) -> Iterator[Prepared]:
        """See `Method.applied`."""
        has_image_B = (batch.image_index >= 0).any(1)
        if not has_image_B.any():
            yield Prepared(batch)
            return
        with self.second_view(student, batch, decoding) as second:
            joined = join_views(batch, second)
            yield Prepared(joined, (TwoViews(self.combine, has_image_B, joined.input_ids.shape[1]),))


class TwoViews:
    """A logits processor that gives both rows of each sample the scores of their contrast.

    Args:
        combine: see `Contrast.combine`.
        contrasted_B: whether a sample has two views; the others keep the logits of the first row.
        prompt: L of the prompts, padding included.
    """

    def __init__(self, combine: Combine, contrasted_B: torch.Tensor, prompt: int) -> None:
        self._combine, self._contrasted_B, self._prompt = combine, contrasted_B, prompt

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return scores [2 B, V].

        Args:
            input_ids: tokens so far, [2 B, L].
            scores: logits, [2 B, V].
        """
        first_BV, second_BV = scores.chunk(2)
        combined_BV = self._combine(first_BV, second_BV, input_ids.shape[1] - self._prompt)
        return combined_BV.where(self._contrasted_B[:, None], first_BV).repeat(2, 1)


def amplify(first_BV: torch.Tensor, second_BV: torch.Tensor, alpha: float) -> torch.Tensor:
    """Return (1 + alpha) first - alpha second."""
    return (1 + alpha) * first_BV - alpha * second_BV


def plausible(scores_BV: torch.Tensor, first_BV: torch.Tensor, beta: float) -> torch.Tensor:
    """Apply the adaptive plausibility constraint.

    Args:
        scores_BV: scores of the contrast.
        first_BV: logits of the first view.
        beta: smallest probability of a token, as a fraction of that of the most probable one; 0 leaves all tokens.

    Returns:
        The scores, -inf where a token is not plausible.
    """
    if beta == 0:
        return scores_BV
    return scores_BV.masked_fill(first_BV < first_BV.amax(-1, keepdim=True) + math.log(beta), -torch.inf)


def join_views(first: Batch, second: Batch) -> Batch:
    """Return a batch of the rows of both views, first those of the first one.

    Both have the same samples and are left-padded. The second one may have shorter rows, and may be without images.
    """
    rows, length = first.input_ids.shape
    images = len(first.image_sample)
    has_image = bool((second.image_index >= 0).any())

    def padded(name: str, fill: int) -> torch.Tensor:
        one, other = getattr(first, name), getattr(second, name)
        return torch.cat([one, F.pad(other, (length - other.shape[1], 0), value=fill)])

    second = replace(second, image_index=torch.where(second.image_index >= 0, second.image_index + images, -1))
    joined = replace(
        first,
        input_ids=padded("input_ids", _text_token(first)),
        attention_mask=padded("attention_mask", 0),
        labels=padded("labels", IGNORE),
        question_mask=padded("question_mask", 0),
        image_index=padded("image_index", -1),
        attention_rows=None if first.attention_rows is None else padded("attention_rows", 0),
        cell_mask=None if first.cell_mask is None else padded("cell_mask", 0),
        keys=first.keys * 2,
    )
    if not has_image:
        return joined
    return replace(
        joined,
        student_pixels=torch.cat([first.student_pixels, second.student_pixels]),
        image_weight=first.image_weight.repeat(2),
        patch_valid=first.patch_valid.repeat(2, 1),
        image_sample=torch.cat([first.image_sample, first.image_sample + rows]),
    )


def without_images(batch: Batch) -> Batch:
    """Return the samples without their image tokens, left-padded. A sample without images is as before."""
    kept_BL = batch.attention_mask & (batch.image_index < 0)
    return take_tokens(batch, [kept.nonzero().flatten() for kept in kept_BL])


def take_tokens(batch: Batch, places: Sequence[torch.Tensor], rows: Sequence[int] | None = None) -> Batch:
    """Return samples with some of their tokens, left-padded. What belongs to images is that of all samples.

    Args:
        batch: a padded batch.
        places: of each returned sample, the places of its tokens in its row, int64. One may occur several times.
        rows: the samples to return; None for all.
    """
    rows = range(len(batch.input_ids)) if rows is None else rows

    def taken(values_BL: torch.Tensor, fill: int) -> torch.Tensor:
        parts = [values_BL[row, tokens] for row, tokens in zip(rows, places, strict=True)]
        return pad_sequence(parts, batch_first=True, padding_value=fill, padding_side="left")

    return map_tokens(batch, taken)


def map_tokens(batch: Batch, change: Callable[[torch.Tensor, int], torch.Tensor]) -> Batch:
    """Return a batch with all values of tokens changed.

    Args:
        batch: a padded batch.
        change: takes values [B, L], and the value of padding.
    """
    return replace(
        batch,
        input_ids=change(batch.input_ids, _text_token(batch)),
        attention_mask=change(batch.attention_mask, 0),
        labels=change(batch.labels, IGNORE),
        question_mask=change(batch.question_mask, 0),
        image_index=change(batch.image_index, -1),
        attention_rows=None if batch.attention_rows is None else change(batch.attention_rows, 0),
        cell_mask=None if batch.cell_mask is None else change(batch.cell_mask, 0),
    )


def _text_token(batch: Batch) -> int:
    """Return a token of the prompts for padding, which is no image token; that of some students has the id 0."""
    return int(batch.input_ids[batch.attention_mask & (batch.image_index < 0)][0])
