"""What a view of a batch shows: the images of both towers, the tokens, and which tokens are supervised."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from medalign.contracts import IGNORE, Batch
from medalign.geometry import PreprocessCfg

IMAGE, QUESTION, ANSWER, OTHER = "image", "question", "answer", "template"  # kinds of tokens


@dataclass(frozen=True)
class Piece:
    """Consecutive tokens of one kind."""

    kind: str
    text: str
    start: int  # position of the first token in its sample
    tokens: int


@dataclass(frozen=True)
class Row:
    """One sample of the batch."""

    key: str
    pieces: tuple[Piece, ...]
    length: int  # tokens without padding
    padded: int  # tokens with padding
    student: tuple[Image.Image, ...]
    teacher: tuple[Image.Image, ...]
    question_cut: int = 0  # tokens removed from the question by the length limit
    answer_cut: int = 0  # tokens removed from the answer, including its end token

    @property
    def full_length(self) -> int:
        """Number of tokens without truncation."""
        return self.length + self.question_cut + self.answer_cut

    @property
    def counts(self) -> str:
        """Numbers of tokens, supervised tokens and padding tokens."""
        return f"{self.length} tokens, {self.supervised} supervised, {self.padded - self.length} padding"

    @property
    def cut(self) -> str:
        """A note on truncated tokens; empty if there are none."""
        parts = [("question", self.question_cut), ("answer", self.answer_cut)]
        cut = " and ".join(f"{tokens} tokens of the {part}" for part, tokens in parts if tokens)
        return f"CUT OFF: {cut}, of {self.full_length} tokens in total" if cut else ""

    @property
    def spans(self) -> str:
        """Kind, first position and last position of each piece."""
        return ", ".join(f"{piece.kind} {piece.start}-{piece.start + piece.tokens - 1}" for piece in self.pieces)

    @property
    def supervised(self) -> int:
        """Number of supervised tokens."""
        return sum(piece.tokens for piece in self.pieces if piece.kind == ANSWER)


@dataclass(frozen=True)
class BatchView:
    """A batch in the form in which it is shown."""

    title: str
    rows: tuple[Row, ...]
    skipped: tuple[str, ...]
    max_length: int  # maximum number of tokens per sample

    @property
    def padding(self) -> float:
        """Fraction of all tokens that are padding."""
        total = sum(row.padded for row in self.rows)
        return 1 - sum(row.length for row in self.rows) / max(total, 1)

    @property
    def summary(self) -> str:
        """One line of counts."""
        lengths = [row.length for row in self.rows]
        return (
            f"{len(self.rows)} samples of {min(lengths)} to {max(lengths)} tokens, {sum(lengths)} in total, "
            f"{sum(row.supervised for row in self.rows)} supervised; padding {100 * self.padding:.1f} %"
        )

    @property
    def longest(self) -> str:
        """The length of the longest sample without truncation, and the limit that would truncate no sample."""
        row, cut = max(self.rows, key=lambda row: row.full_length), sum(bool(row.cut) for row in self.rows)
        text = f"longest sample: {row.key}, {row.full_length} tokens; data.max_length is {self.max_length}"
        if not cut:
            return f"{text}, no sample is truncated"
        return (
            f"{text}, which truncates {cut} of {len(self.rows)} samples; --data.max_length {row.full_length} would "
            "truncate none of them"
        )


def view_batch(
    batches: Sequence[Batch],
    tokenizer: Any,
    student: PreprocessCfg,
    teacher: PreprocessCfg | None,
    title: str,
    max_length: int,
) -> BatchView:
    """Build the view of a step from its micro-batches.

    Args:
        batches: the micro-batches.
        tokenizer: decodes the tokens.
        student: has the `mean` and `std` of the student's pixels.
        teacher: has the `mean` and `std` of the teacher's pixels; None to omit them.
        title: title of the view.
        max_length: maximum number of tokens per sample.
    """
    rows: list[Row] = []
    for batch in batches:
        sample_BL = batch.sample_of_token()
        for i, key in enumerate(batch.keys):
            places = ((sample_BL == i) & batch.attention_mask).nonzero(as_tuple=True)
            mine = ((batch.image_sample == i) & (batch.image_weight > 0)).nonzero()[:, 0].tolist()
            rows.append(
                Row(
                    key=key,
                    pieces=tuple(_pieces(batch, places, tokenizer)),
                    length=len(places[0]),
                    padded=int((sample_BL == i).sum()),
                    student=tuple(_picture(batch.student_pixels[n], student) for n in mine),
                    teacher=tuple(_picture(batch.teacher_pixels[n], teacher) for n in mine) if teacher else (),
                    question_cut=batch.cuts[i][0],
                    answer_cut=batch.cuts[i][1],
                )
            )
    return BatchView(title, tuple(rows), tuple(reason for batch in batches for reason in batch.skipped), max_length)


def _pieces(batch: Batch, places: tuple[torch.Tensor, ...], tokenizer: Any) -> Iterator[Piece]:
    """Split the tokens of one sample where their kind changes.

    Args:
        batch: the micro-batch.
        places: rows and positions of the sample's tokens.
        tokenizer: decodes the tokens.
    """
    ids, image_index = batch.input_ids[places].numpy(), batch.image_index[places].numpy()
    cells = batch.cells[places].numpy()
    kinds = np.full(len(ids), 3)
    kinds[batch.question_mask[places].numpy()] = 1
    kinds[batch.labels[places].numpy() != IGNORE] = 2
    kinds[image_index >= 0] = 0
    names = (IMAGE, QUESTION, ANSWER, OTHER)
    change = (np.diff(kinds) != 0) | (np.diff(image_index) != 0)
    for part in np.split(np.arange(len(ids)), np.flatnonzero(change) + 1):
        kind = names[kinds[part[0]]]
        text = _describe_image(len(part), cells[part].sum()) if kind == IMAGE else tokenizer.decode(ids[part])
        yield Piece(kind, text, int(part[0]), len(part))


def _describe_image(tokens: int, cells: int) -> str:
    """Say how many tokens an image has, and how many of them are cells of the grid if not all are."""
    return (
        f"[image of {tokens} tokens]" if cells == tokens else f"[image of {tokens} tokens, of which {cells} are cells]"
    )


def _picture(pixels: torch.Tensor, tower: PreprocessCfg) -> Image.Image:
    """Normalized pixels [3, S, S] as a picture again."""
    shown = pixels * torch.tensor(tower.std)[:, None, None] + torch.tensor(tower.mean)[:, None, None]
    return Image.fromarray((shown.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy())
