"""Collate samples into a batch: padded tokens, masks for the spans, and a view of one canvas for each tower.

Shape suffixes as in `geometry`: I images, N student image tokens, B samples, L tokens; S and T are the side lengths of
the student's and the teacher's input in pixels.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal, NamedTuple, Protocol

import numpy as np
import torch
from PIL import Image

from medalign.config.schema.losses import AttentionRows
from medalign.contracts import IGNORE, Batch, Sample
from medalign.data.batches.attention_rows import official_rows
from medalign.data.batches.prompts import Encoded, PromptEncoder
from medalign.errors import ConfigError
from medalign.geometry import PIXELS, CanvasFrame, PreprocessCfg, coverage, square_canvas

Inputs = Mapping[str, torch.Tensor]  # what one teacher reads of one image, by name


class TeacherView(Protocol):
    """What a teacher reads of an image: its pixels (`PreprocessCfg`), or what it gave for them before."""

    @property
    def size(self) -> int:
        """Pixels per side of the teacher's input, T."""

    def inputs(self, canvas: Image.Image, where: str = "") -> Inputs:
        """Return what the teacher reads of a canvas.

        Args:
            canvas: the square canvas.
            where: shard and key of the sample, for error messages.

        Raises:
            DataError: there is nothing for this canvas.
        """

    def blank(self) -> Inputs:
        """Return what it reads of the image of weight 0 in a batch without images."""


class Prepared(NamedTuple):
    """One sample, ready to be collated."""

    key: str
    question: str
    report: str  # empty for other tasks
    encoded: Encoded
    student_views: list[torch.Tensor]  # [3, S, S] per image
    teacher_inputs: list[tuple[Inputs, ...]]  # per image, what each teacher reads
    patch_valid: list[np.ndarray]  # [cells] bool per image


class Collator:
    """Collates samples into a `Batch`. Both towers see the same square canvas.

    Args:
        encoder: the prompt encoder of the student.
        student_view: preprocessing of the student's tower; its mean color pads the canvas.
        teacher_view: preprocessing of the teacher's tower, or another view for it; None leaves teacher_pixels empty,
            [I, 3, 0, 0].
        also: the views of further teachers.
        padding_side: "right" for training, "left" for generation.
        with_answer: whether the answer and its labels are appended.
        attention_rows: "prompt", or "official" (see `losses.attention_rows`).
        packed: concatenate the samples in one row without padding.
        pad_token_id: None takes the one of the encoder.

    Raises:
        ConfigError: "official" rows do not fit the chat template.
    """

    def __init__(
        self,
        encoder: PromptEncoder,
        student_view: PreprocessCfg,
        teacher_view: TeacherView | None,
        *,
        also: Sequence[TeacherView] = (),
        padding_side: Literal["right", "left"] = "right",
        with_answer: bool = True,
        attention_rows: AttentionRows = "prompt",
        packed: bool = False,
        pad_token_id: int | None = None,
    ) -> None:
        self.encoder = encoder
        self.student_view = student_view
        self.teacher_views: tuple[TeacherView, ...] = (*([] if teacher_view is None else [teacher_view]), *also)
        self.grid = encoder.image.grid
        self.padding_side = padding_side
        self.with_answer = with_answer
        self.attention_rows = attention_rows
        self.packed = packed
        self.pad_token_id = encoder.pad_token_id if pad_token_id is None else pad_token_id
        if attention_rows == "official":
            self._require_colon()

    def __call__(self, samples: Sequence[Sample]) -> Batch:
        """Collate samples. Raises BadSample (a DataError) for the first sample that cannot be used."""
        return self.join([self.prepare(sample) for sample in samples])

    @property
    def pixels(self) -> int:
        """Side length in pixels that images need: that of the largest tower."""
        return max(view.size for view in (self.student_view, *self.teacher_views))

    def without_teachers(self) -> Collator:
        """Return the same collator for batches that no teacher reads."""
        other = copy.copy(self)
        other.teacher_views = ()
        return other

    def dummy_batch(self) -> Batch:
        """Build a batch without loss, for a rank without a sample: text only, nothing supervised."""
        sample = Sample("dummy", "none", "vqa", "-", "yes", "open", ())
        batch = self.join([self.prepare(sample)])
        return replace(batch, labels=torch.full_like(batch.labels, IGNORE), keys=(), cuts=(), truncated=0)

    def prepare(self, sample: Sample) -> Prepared:
        """Do all work that is needed per sample. Raises BadSample."""
        canvases = [square_canvas(image, self.student_view.mean_color) for image in sample.images]
        frames = [CanvasFrame(*image.size) for image in sample.images]
        return Prepared(
            key=sample.key,
            question=sample.question,
            report=sample.answer if sample.task == "report" else "",
            encoded=self.encoder.encode(sample, with_answer=self.with_answer),
            student_views=[self.student_view.view(canvas) for canvas in canvases],
            teacher_inputs=[
                tuple(view.inputs(canvas, f"{sample.shard}/{sample.key}") for view in self.teacher_views)
                for canvas in canvases
            ],
            patch_valid=[coverage([frame.picture], self.grid) > 0 for frame in frames],
        )

    def join(self, prepared: Sequence[Prepared]) -> Batch:
        """Pad and stack, or pack, prepared samples. Images are indexed within the batch, in sample order."""
        texts = [p.encoded for p in prepared]
        owners = [row for row, p in enumerate(prepared) for _ in p.student_views]
        image_index, before = [], 0
        for p in prepared:
            image_index.append([i + before if i >= 0 else -1 for i in p.encoded.image_index])
            before += len(p.student_views)
        dummy = not owners
        teachers = self._teachers([inputs for p in prepared for inputs in p.teacher_inputs])
        first: Inputs = teachers[0] if teachers else {}
        return Batch(
            input_ids=self._rows([t.input_ids for t in texts], self.pad_token_id),
            attention_mask=self._rows([[True] * len(t.input_ids) for t in texts], False),
            labels=self._rows([t.labels for t in texts], IGNORE),
            question_mask=self._rows([t.question_mask for t in texts], False),
            image_index=self._rows(image_index, -1),
            student_pixels=torch.stack(
                [v for p in prepared for v in p.student_views] or [self.student_view.blank()[PIXELS]]
            ),
            teacher_pixels=first.get(PIXELS, torch.zeros(len(owners) or 1, 3, 0, 0)),
            image_weight=torch.zeros(1) if dummy else torch.ones(len(owners)),
            patch_valid=self._patch_valid([v for p in prepared for v in p.patch_valid]),
            image_sample=torch.tensor(owners or [0]),
            cell_mask=self._rows([t.cells for t in texts], False) if self.encoder.image.cells else None,
            attention_rows=self._official_rows(texts) if self.attention_rows == "official" else None,
            lengths=tuple(len(t.input_ids) for t in texts) if self.packed else (),
            image_questions=tuple(prepared[row].question for row in owners) or ("",),
            image_reports=tuple(prepared[row].report for row in owners) or ("",),
            teacher_inputs=None if [set(each) for each in teachers] in ([], [{PIXELS}]) else teachers,
            keys=tuple(p.key for p in prepared),
            cuts=tuple((t.question_cut, t.answer_cut) for t in texts),
            truncated=sum(t.truncated for t in texts),
        )

    def _official_rows(self, texts: Sequence[Encoded]) -> torch.Tensor:
        return self._rows([official_rows(text, self.encoder.tokenizer) for text in texts], False)

    def _require_colon(self) -> None:
        """Raise ConfigError if no token of a question would be selected under this chat template."""
        question = Sample("probe", "none", "vqa", "-", "-", "open", (Image.new("L", (1, 1)),))
        if not any(official_rows(self.encoder.encode(question, with_answer=False), self.encoder.tokenizer)):
            raise ConfigError(
                "losses.attention_rows is official, but the student's chat template writes no ':' after the image; use "
                "a template like vicuna_v1 (USER: ... ASSISTANT:), or set losses.attention_rows to prompt"
            )

    def _rows(self, rows: Sequence[Sequence[int]], padding: int) -> torch.Tensor:
        """[B, L], or [1, L] with all samples concatenated."""
        tensors = [torch.tensor(row) for row in rows]
        if self.packed:
            return torch.cat(tensors)[None]
        return torch.nn.utils.rnn.pad_sequence(
            tensors, batch_first=True, padding_value=padding, padding_side=self.padding_side
        )

    def _teachers(self, images: Sequence[tuple[Inputs, ...]]) -> tuple[Inputs, ...]:
        """What each teacher reads of all images. Every rank calls its towers once per micro-batch, with or without."""
        images = images or [tuple(view.blank() for view in self.teacher_views)]
        each = zip(*images, strict=True)
        return tuple({name: torch.stack([one[name] for one in mine]) for name in mine[0]} for mine in each)

    def _patch_valid(self, rows: list[np.ndarray]) -> torch.Tensor:
        return torch.from_numpy(np.stack(rows) if rows else np.zeros((1, self.grid.size), dtype=bool))
