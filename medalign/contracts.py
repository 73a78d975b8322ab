"""Data types passed between packages. Shape suffixes as in `geometry`; also H heads and V vocabulary size."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple

import torch
from PIL import Image

from medalign.geometry import PIXELS, PatchGrid

IGNORE = -100  # label of a token that the language loss ignores


@dataclass(frozen=True)
class Sample:
    """One decoded question (or report request) about zero or more images, as read from a shard."""

    key: str  # unique in its data set; name of its members in the tar
    shard: str  # file name of the shard
    task: str  # "vqa" or "report"
    question: str  # never empty
    answer: str  # the target text (the report, for task "report"); never empty
    answer_type: str  # "closed", "open", or "" for reports
    images: tuple[Image.Image, ...]  # mode L or RGB, upright, not yet on the canvas; may be empty
    boxes: tuple[tuple[float, float, float, float], ...] = ()  # pixels of the first stored image
    metadata: dict[str, Any] = field(default_factory=dict)  # all other fields of the JSON


@dataclass(frozen=True)
class ImageTokens:
    """How an image is written in a prompt: as a run of image tokens, all or some of which are the cells of a grid.

    Attributes:
        token_id: id of the image token.
        grid: the grid of the cells. The cells are in row-major order.
        cells: for each image token, whether it is a cell. The others only accompany the cells, such as line ends. Empty
            if all are cells.
        marker: what the chat template writes for an image; empty if it writes the image token.
        text: what the model expects in place of the marker: one image token and the text around it.
    """

    token_id: int
    grid: PatchGrid
    cells: tuple[bool, ...] = ()
    marker: str = ""
    text: str = ""

    @property
    def count(self) -> int:
        """Image tokens per image, N."""
        return len(self.cells) or self.grid.size


@dataclass
class Batch:
    """A micro-batch on one device. I counts the images; without any image there is one dummy with weight 0.

    If padded, each of the B rows holds one sample. If packed, a single row (B = 1) holds S samples one after another
    without padding, and each sample attends only to itself.
    """

    input_ids: torch.Tensor  # [B, L] int64; each image is N image tokens
    attention_mask: torch.Tensor  # [B, L] bool; False at padding
    labels: torch.Tensor  # [B, L] int64; IGNORE outside the answer, not shifted
    question_mask: torch.Tensor  # [B, L] bool; prompt tokens after the last image, never the answer
    image_index: torch.Tensor  # [B, L] int64; index of the image in the batch at its image tokens, -1 elsewhere
    student_pixels: torch.Tensor  # [I, 3, S, S] float32
    teacher_pixels: torch.Tensor  # [I, 3, T, T] float32; T is 0 without a teacher that reads pixels
    image_weight: torch.Tensor  # [I] float32; 0 for the dummy, otherwise 1
    patch_valid: torch.Tensor  # [I, cells] bool; False if the patch contains only canvas padding
    image_sample: torch.Tensor  # [I] int64; index of the sample that the image belongs to
    attention_rows: torch.Tensor | None = None  # [B, L] bool; rows of the attention loss, if not question_mask
    cell_mask: torch.Tensor | None = None  # [B, L] bool; image tokens that are cells of the grid; None: all of them
    lengths: tuple[int, ...] = ()  # tokens of each sample of a packed batch; empty for a padded one
    image_questions: tuple[str, ...] = ()  # [I]; the question of each image's sample, in memory only
    image_reports: tuple[str, ...] = ()  # [I]; the report of each image's sample, empty for other tasks; in memory only
    # What each teacher reads, by name, if that is not only teacher_pixels: its pixels, or its outputs from a cache.
    teacher_inputs: tuple[Mapping[str, torch.Tensor], ...] | None = None
    keys: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()  # "shard/key: reason" of bad samples replaced in this batch
    cuts: tuple[tuple[int, int], ...] = ()  # tokens of each sample's question and answer cut to the length limit
    truncated: int = 0  # samples whose text was cut to the length limit

    def to(self, device: torch.device) -> Batch:
        """Return the batch with all tensors on this device."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self) if torch.is_tensor(getattr(self, f.name))}
        moved: dict[str, Any] = {name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()}
        if self.teacher_inputs is not None:
            moved["teacher_inputs"] = tuple(
                {name: tensor.to(device, non_blocking=True) for name, tensor in each.items()}
                for each in self.teacher_inputs
            )
        return replace(self, **moved)

    def sample(self, row: int) -> Batch:
        """Return one sample of a padded batch by itself, without its padding. What teachers read is left out."""
        valid, index_BL = self.attention_mask[row], self.image_index[row : row + 1]
        has_image = bool((index_BL >= 0).any())
        own = (self.image_sample == row).nonzero().flatten() if has_image else self.image_sample.new_zeros(1)
        first, last = int(own[0]), int(own[-1]) + 1
        tokens: dict[str, Any] = {
            name: value[row : row + 1, valid]
            for name in ("input_ids", "attention_mask", "labels", "question_mask", "attention_rows", "cell_mask")
            if (value := getattr(self, name)) is not None
        }
        cuts = self.cuts[row : row + 1]
        return Batch(
            **tokens,
            image_index=torch.where(index_BL >= 0, index_BL - first, -1)[:, valid],
            student_pixels=self.student_pixels[own],
            teacher_pixels=self.teacher_pixels[own],
            image_weight=self.image_weight[own] * has_image,
            patch_valid=self.patch_valid[own] & has_image,
            image_sample=torch.zeros_like(own),
            image_questions=self.image_questions[first:last],
            image_reports=self.image_reports[first:last],
            keys=self.keys[row : row + 1],
            cuts=cuts,
            truncated=sum(map(any, cuts)),
        )

    @property
    def teachers(self) -> tuple[Mapping[str, torch.Tensor], ...]:
        """What each teacher reads, by name; each tensor is [I, ...]."""
        return ({PIXELS: self.teacher_pixels},) if self.teacher_inputs is None else self.teacher_inputs

    @property
    def rows(self) -> torch.Tensor:
        """Tokens whose attention to the image is distilled, bool [B, L]."""
        return self.question_mask if self.attention_rows is None else self.attention_rows

    @property
    def cells(self) -> torch.Tensor:
        """Image tokens that are cells of the student's grid, bool [B, L]."""
        return self.image_index >= 0 if self.cell_mask is None else self.cell_mask

    def bounds(self) -> torch.Tensor:
        """Return the start of each sample among the B * L tokens, and the end of the last one, int64 [S + 1]."""
        rows, length = self.input_ids.shape
        ends = list(itertools.accumulate(self.lengths or (length,) * rows))
        return torch.tensor([0, *ends], device=self.input_ids.device)

    def sample_of_token(self) -> torch.Tensor:
        """Return the index of the sample that each token, or its padding, belongs to, int64 [B, L]."""
        tokens = torch.arange(self.input_ids.numel(), device=self.input_ids.device)
        return torch.searchsorted(self.bounds()[1:], tokens, right=True).view_as(self.input_ids)


@dataclass(frozen=True)
class TeacherTargets:
    """Targets of the student, already on the student's grid, in float32, without gradient."""

    features: torch.Tensor  # [I, N, b]
    attention: torch.Tensor | None  # [I, N]; the attention target; None if the teacher has none
    also: tuple[TeacherTargets, ...] = ()  # those of the further teachers, each without `also`

    def of(self, teacher: int) -> TeacherTargets:
        """Return the targets of one teacher: 0 is the first, the others follow in the order of `teacher.also`."""
        return self if teacher == 0 else self.also[teacher - 1]


class TappedBlock(NamedTuple):
    """What one block gives to the distillation losses."""

    tokens: torch.Tensor  # [I, N, d]
    attention: torch.Tensor  # [I, N] float32


class StudentOutput(NamedTuple):
    """Result of one forward pass of the student. A tuple, so that ZeRO-3 finds the tensors in it."""

    logits: torch.Tensor  # [B, K, V]; logits at the K kept positions only
    kept: torch.Tensor  # [K] int64; positions (0..L-1) whose logits were kept
    tokens: torch.Tensor | None  # [I, N, d]; steered image tokens entering the tapped block
    attention: torch.Tensor | None  # [I, N] float32; attention of the question at the tapped block
    others: tuple[TappedBlock, ...] = ()  # the same of the tapped blocks after the first

    @property
    def blocks(self) -> tuple[TappedBlock, ...]:
        """All tapped blocks; empty if nothing was captured."""
        if self.tokens is None or self.attention is None:
            return ()
        return (TappedBlock(self.tokens, self.attention), *self.others)


@dataclass(frozen=True)
class LossValue:
    """The sum of a loss term and the count to divide it by, both of one micro-batch."""

    sum: torch.Tensor  # scalar float32, carries gradient
    count: torch.Tensor  # scalar float32


@dataclass(frozen=True)
class LossReport:
    """The loss terms of one micro-batch and the scalar to differentiate."""

    terms: dict[str, LossValue]
    total: torch.Tensor  # scalar float32
