"""Views of a batch as text, HTML or PNG: the images of both towers, the tokens, and which tokens are supervised."""

from __future__ import annotations

import base64
import io
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

import jinja2
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from medalign.contracts import IGNORE, Batch
from medalign.geometry import PreprocessCfg

IMAGE, QUESTION, ANSWER, OTHER = "image", "question", "answer", "template"
# SGR code for the terminal, and color for HTML and PNG; both are readable on light and dark backgrounds.
_STYLES = {IMAGE: ("34", "#2f6fd0"), QUESTION: ("33", "#9a6b00"), ANSWER: ("1;32", "#12805c"), OTHER: ("2", "#7a8592")}
_CUT = ("1;31", "#b3261e")  # style of the note on truncated tokens
_COLUMNS = 28  # characters per image in the terminal
_ACROSS = 4  # images of a sample per line
_THUMB, _WIDTH, _LINE = 160, 1100, 16  # pixels in the PNG: side of an image, width of the page, height of a line


@dataclass(frozen=True)
class Piece:
    """Consecutive tokens of one kind."""

    kind: str
    text: str
    start: int  # position of the first token in its sample
    tokens: int

    @property
    def color(self) -> str:
        return _STYLES[self.kind][1]


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
    def lines(self) -> list[tuple[Image.Image, ...]]:
        """The images line by line: the student's, then the teacher's."""
        pictures = (*self.student, *self.teacher)
        return [pictures[start : start + _ACROSS] for start in range(0, len(pictures), _ACROSS)]

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


def as_text(view: BatchView, color: bool) -> str:
    """Format the view for the terminal. Without color there are no images, and answers are put in guillemets."""
    lines = [view.title, view.summary, view.longest, ""]
    if color:
        lines.insert(3, "  ".join(_sgr(kind, kind) for kind in _STYLES))
    for row in view.rows:
        lines.append(f"{row.key}: {row.counts}")
        if row.cut:
            lines.append(f"  \x1b[{_CUT[0]}m{row.cut}\x1b[0m" if color else f"  {row.cut}")
        if color:
            lines += _blocks(row)
        lines.append("  " + " ".join(_sgr(p.kind, p.text) if color else _mark_answer(p) for p in row.pieces))
        lines.append(f"  {row.spans}")
        lines.append("")
    lines += [f"bad sample replaced: {reason}" for reason in view.skipped]
    return "\n".join(lines).rstrip() + "\n"


def as_html(view: BatchView) -> str:
    """One page that loads nothing from elsewhere."""
    text = (resources.files("medalign.evaluation.report") / "batch.html.jinja").read_text(encoding="utf-8")
    template = jinja2.Environment(autoescape=True).from_string(text)
    colors = {kind: color for kind, (_, color) in _STYLES.items()}
    return template.render(view=view, colors=colors, cut_color=_CUT[1], data_uri=_data_uri)


def as_picture(view: BatchView) -> Image.Image:
    """Draw the view as one image."""
    font = ImageFont.load_default(13)
    across = max((len(line) for row in view.rows for line in row.lines), default=0)
    left = 16 + across * (_THUMB + 8)
    characters = max(30, (_WIDTH - left) // 7)
    texts = [list(_wrapped(row, characters)) for row in view.rows]
    heights = [
        max(_THUMB * bool(across), (_THUMB + 8) * len(row.lines) - 8, _LINE * (len(text) + 2)) + 12
        for row, text in zip(view.rows, texts, strict=True)
    ]
    page = Image.new("RGB", (_WIDTH, 76 + sum(heights)), "white")
    draw = ImageDraw.Draw(page)
    draw.text((12, 8), view.title, fill="black", font=font)
    draw.text((12, 28), view.summary, fill="black", font=font)
    draw.text((12, 48), view.longest, fill="black", font=font)
    top = 72
    for row, text, height in zip(view.rows, texts, heights, strict=True):
        for down, line in enumerate(row.lines):
            for n, picture in enumerate(line):
                page.paste(picture.resize((_THUMB, _THUMB)), (12 + n * (_THUMB + 8), top + down * (_THUMB + 8)))
        draw.text((left, top), f"{row.key}: {row.counts}", fill="black", font=font)
        for n, (words, color) in enumerate(text, start=1):
            draw.text((left, top + n * _LINE), words, fill=color, font=font)
        top += height
    return page


def _pieces(batch: Batch, places: tuple[torch.Tensor, ...], tokenizer: Any) -> Iterator[Piece]:
    """Split the tokens of one sample where their kind changes.

    Args:
        batch: the micro-batch.
        places: rows and positions of the sample's tokens.
        tokenizer: decodes the tokens.
    """
    ids, image_index = batch.input_ids[places].numpy(), batch.image_index[places].numpy()
    kinds = np.full(len(ids), 3)
    kinds[batch.question_mask[places].numpy()] = 1
    kinds[batch.labels[places].numpy() != IGNORE] = 2
    kinds[image_index >= 0] = 0
    names = (IMAGE, QUESTION, ANSWER, OTHER)
    change = (np.diff(kinds) != 0) | (np.diff(image_index) != 0)
    for part in np.split(np.arange(len(ids)), np.flatnonzero(change) + 1):
        kind = names[kinds[part[0]]]
        text = f"[image of {len(part)} tokens]" if kind == IMAGE else tokenizer.decode(ids[part])
        yield Piece(kind, text, int(part[0]), len(part))


def _picture(pixels: torch.Tensor, tower: PreprocessCfg) -> Image.Image:
    """Normalized pixels [3, S, S] as a picture again."""
    shown = pixels * torch.tensor(tower.std)[:, None, None] + torch.tensor(tower.mean)[:, None, None]
    return Image.fromarray((shown.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy())


def _sgr(kind: str, text: str) -> str:
    return f"\x1b[{_STYLES[kind][0]}m{text}\x1b[0m"


def _mark_answer(piece: Piece) -> str:
    return f"«{piece.text}»" if piece.kind == ANSWER else piece.text


def _blocks(row: Row) -> list[str]:
    """Draw the images next to each other with two pixels per character."""
    lines = []
    for pictures in row.lines:
        shown = [np.asarray(p.resize((_COLUMNS, _COLUMNS)), dtype=np.uint8) for p in pictures]
        for y in range(0, _COLUMNS, 2):
            line = ""
            for pixels in shown:
                for above, below in zip(pixels[y], pixels[y + 1], strict=True):
                    fore, back = (";".join(str(int(v)) for v in pixel) for pixel in (above, below))
                    line += f"\x1b[38;2;{fore}m\x1b[48;2;{back}m▀"
                line += "\x1b[0m  "
            lines.append("  " + line)
    return lines


def _wrapped(row: Row, characters: int) -> Iterator[tuple[str, str]]:
    """Yield the lines of a sample's text, each with its color."""
    for line in textwrap.wrap(row.cut, characters):
        yield line, _CUT[1]
    for piece in row.pieces:
        for line in textwrap.wrap(piece.text, characters) or [""]:
            yield line, piece.color
    for line in textwrap.wrap(row.spans, characters):
        yield line, _STYLES[OTHER][1]


def _data_uri(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
