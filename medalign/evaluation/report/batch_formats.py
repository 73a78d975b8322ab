"""A view of a batch as text for the terminal, as an HTML page, or as a picture."""

from __future__ import annotations

import base64
import io
import textwrap
from collections.abc import Iterator
from importlib import resources

import jinja2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from medalign.evaluation.report.batches import ANSWER, IMAGE, OTHER, QUESTION, BatchView, Piece, Row

# SGR code for the terminal, and color for HTML and PNG; both are readable on light and dark backgrounds.
_STYLES = {IMAGE: ("34", "#2f6fd0"), QUESTION: ("33", "#9a6b00"), ANSWER: ("1;32", "#12805c"), OTHER: ("2", "#7a8592")}
_CUT = ("1;31", "#b3261e")  # style of the note on truncated tokens
_COLUMNS = 28  # characters per image in the terminal
_ACROSS = 4  # images of a sample per line
_THUMB, _WIDTH, _LINE = 160, 1100, 16  # pixels in the PNG: side of an image, width of the page, height of a line


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
    """Format the view as a self-contained HTML page."""
    text = (resources.files("medalign.evaluation.report") / "batch.html.jinja").read_text(encoding="utf-8")
    template = jinja2.Environment(autoescape=True).from_string(text)
    colors = {kind: color for kind, (_, color) in _STYLES.items()}
    return template.render(view=view, colors=colors, cut_color=_CUT[1], data_uri=_data_uri)


def as_picture(view: BatchView) -> Image.Image:
    """Draw the view as one image."""
    font = ImageFont.load_default(13)
    across = max((len(line) for row in view.rows for line in _picture_lines(row)), default=0)
    left = 16 + across * (_THUMB + 8)
    characters = max(30, (_WIDTH - left) // 7)
    texts = [list(_wrapped(row, characters)) for row in view.rows]
    heights = [
        max(_THUMB * bool(across), (_THUMB + 8) * len(_picture_lines(row)) - 8, _LINE * (len(text) + 2)) + 12
        for row, text in zip(view.rows, texts, strict=True)
    ]
    page = Image.new("RGB", (_WIDTH, 76 + sum(heights)), "white")
    draw = ImageDraw.Draw(page)
    draw.text((12, 8), view.title, fill="black", font=font)
    draw.text((12, 28), view.summary, fill="black", font=font)
    draw.text((12, 48), view.longest, fill="black", font=font)
    top = 72
    for row, text, height in zip(view.rows, texts, heights, strict=True):
        for down, line in enumerate(_picture_lines(row)):
            for n, picture in enumerate(line):
                page.paste(picture.resize((_THUMB, _THUMB)), (12 + n * (_THUMB + 8), top + down * (_THUMB + 8)))
        draw.text((left, top), f"{row.key}: {row.counts}", fill="black", font=font)
        for n, (words, color) in enumerate(text, start=1):
            draw.text((left, top + n * _LINE), words, fill=color, font=font)
        top += height
    return page


def _sgr(kind: str, text: str) -> str:
    return f"\x1b[{_STYLES[kind][0]}m{text}\x1b[0m"


def _mark_answer(piece: Piece) -> str:
    return f"«{piece.text}»" if piece.kind == ANSWER else piece.text


def _blocks(row: Row) -> list[str]:
    """Draw the images next to each other with two pixels per character."""
    lines = []
    for pictures in _picture_lines(row):
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


def _picture_lines(row: Row) -> list[tuple[Image.Image, ...]]:
    """Return the images line by line: the student's, then the teacher's."""
    pictures = (*row.student, *row.teacher)
    return [pictures[start : start + _ACROSS] for start in range(0, len(pictures), _ACROSS)]


def _wrapped(row: Row, characters: int) -> Iterator[tuple[str, str]]:
    """Yield the lines of a sample's text, each with its color."""
    for line in textwrap.wrap(row.cut, characters):
        yield line, _CUT[1]
    for piece in row.pieces:
        for line in textwrap.wrap(piece.text, characters) or [""]:
            yield line, _STYLES[piece.kind][1]
    for line in textwrap.wrap(row.spans, characters):
        yield line, _STYLES[OTHER][1]


def _data_uri(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
