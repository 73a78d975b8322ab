"""What one room hands to the next. See the shape legend in `geometry`; H heads, V vocabulary."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple

import torch
from PIL import Image

IGNORE = -100  # label of a token that the language loss does not see


@dataclass(frozen=True)
class Sample:
    """One decoded question (or report request) about one or several images, as read from a shard."""

    key: str  # unique in its data set; the member's name in the tar
    shard: str  # file name of the shard
    task: str  # "vqa" or "report"
    question: str  # what the user asks; never empty
    answer: str  # what the model should say (the report, for task "report"); never empty
    answer_type: str  # "closed", "open", or "" for reports
    images: tuple[Image.Image, ...]  # L or RGB, upright, not yet on the canvas; may be empty
    boxes: tuple[tuple[float, float, float, float], ...] = ()  # pixels of the first stored image
    metadata: dict[str, Any] = field(default_factory=dict)  # every other field of the JSON


@dataclass
class Batch:
    """A micro-batch, on one device. I counts the images; where a batch has none, one dummy with weight 0.

    Padded, B rows hold a sample each. Packed, one row (B is 1) holds S samples end to end, each of which sees itself
    alone, and nothing is padding.
    """

    input_ids: torch.Tensor  # [B, L] int64; each image is N image tokens
    attention_mask: torch.Tensor  # [B, L] bool; False at padding
    labels: torch.Tensor  # [B, L] int64; IGNORE outside the answer, not shifted
    question_mask: torch.Tensor  # [B, L] bool; prompt tokens after the (last) image, never the answer
    image_index: torch.Tensor  # [B, L] int64; number of the image at its tokens, -1 elsewhere
    student_pixels: torch.Tensor  # [I, 3, S, S] float32
    teacher_pixels: torch.Tensor  # [I, 3, T, T] float32
    image_weight: torch.Tensor  # [I] float32; 0 for the dummy, else 1
    patch_valid: torch.Tensor  # [I, N] bool; False where the patch is canvas padding alone
    image_sample: torch.Tensor  # [I] int64; number of the sample that the image belongs to
    attention_rows: torch.Tensor | None = None  # [B, L] bool; rows of the attention loss where not question_mask
    lengths: tuple[int, ...] = ()  # tokens of each sample of a packed batch; empty for a padded one
    keys: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()  # "shard/key: reason" of bad samples replaced in this batch
    cuts: tuple[tuple[int, int], ...] = ()  # tokens of each sample's question and answer cut to the length limit
    truncated: int = 0  # samples whose text was cut to the length limit

    def to(self, device: torch.device) -> Batch:
        tensors = {f.name: getattr(self, f.name) for f in fields(self) if torch.is_tensor(getattr(self, f.name))}
        return replace(self, **{name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()})

    @property
    def rows(self) -> torch.Tensor:
        """[B, L] bool: tokens whose attention to the image is distilled."""
        return self.question_mask if self.attention_rows is None else self.attention_rows

    def bounds(self) -> torch.Tensor:
        """[S + 1] int64: where each sample begins among the B * L tokens, and where the last one ends."""
        rows, length = self.input_ids.shape
        ends = list(itertools.accumulate(self.lengths or (length,) * rows))
        return torch.tensor([0, *ends], device=self.input_ids.device)

    def sample_of_token(self) -> torch.Tensor:
        """[B, L] int64: number of the sample that each token, or the padding beside it, belongs to."""
        tokens = torch.arange(self.input_ids.numel(), device=self.input_ids.device)
        return torch.searchsorted(self.bounds()[1:], tokens, right=True).view_as(self.input_ids)


@dataclass(frozen=True)
class TeacherTargets:
    """What the student should match, already on the student's grid, in float32, without gradient."""

    features: torch.Tensor  # [I, N, b]
    attention: torch.Tensor  # [I, N]; the class token's attention to each patch, mean over heads


class StudentOutput(NamedTuple):
    """What one forward pass of the student gives the losses. A tuple, so that ZeRO-3 finds the tensors in it."""

    logits: torch.Tensor  # [B, K, V]; logits at the K kept positions alone
    kept: torch.Tensor  # [K] int64; positions (0..L-1) whose logits were kept
    tokens: torch.Tensor | None  # [I, N, d]; steered image tokens entering the tapped block
    attention: torch.Tensor | None  # [I, N] float32; the question's attention at the tapped block


@dataclass(frozen=True)
class LossValue:
    """The sum of a loss term and the count to divide it by, both of one micro-batch."""

    sum: torch.Tensor  # scalar float32, carries gradient
    count: torch.Tensor  # scalar float32


@dataclass(frozen=True)
class LossReport:
    """The terms of one micro-batch and the scalar to differentiate."""

    terms: dict[str, LossValue]
    total: torch.Tensor  # scalar float32
