"""Generic pictures with generic captions: what the base student sees instead of medical lessons.

Plain shapes are drawn over radiographs and over random textures; the captions and questions speak of the shapes,
of the picture's format and of its exposure, never of disease. Positions are those of the picture, so they teach
that words can name places without teaching the patient's sides. Arrays are [side, side] float32 in [0, 1].
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

from medalign.geometry import CanvasFrame, square_canvas

SHAPES = ("disc", "ring", "bar", "cross", "block", "triangle", "patch")
ROWS, COLUMNS = ("top", "middle", "bottom"), ("left", "centre", "right")
NUMBERS = ("no", "one", "two", "three")
Turn = tuple[str, str]  # question, answer


@dataclass(frozen=True)
class Pool:
    """Radiographs on their canvases, rendered once."""

    canvases: np.ndarray  # [P, side, side] uint8
    frames: list[CanvasFrame]


@dataclass(frozen=True)
class Shape:
    """One shape and the cell of a 3 x 3 grid over the picture in which its centre lies."""

    name: str
    tone: str
    size: str
    row: str
    column: str

    @property
    def place(self) -> str:
        return f"{self.row} {self.column}"


def fit(image: Image.Image, side: int) -> tuple[np.ndarray, CanvasFrame]:
    """An image on its square canvas, grey, side x side, as uint8."""
    canvas = square_canvas(image).convert("L").resize((side, side), Image.Resampling.BICUBIC)
    return np.asarray(canvas), CanvasFrame(*image.size)


def texture(rng: np.random.Generator, side: int) -> tuple[np.ndarray, CanvasFrame]:
    """Clouds at several scales on a film of random format."""
    cloud = np.zeros((side, side), dtype=np.float32)
    for cells in (2, 5, 12):
        coarse = Image.fromarray(rng.standard_normal((cells, cells)).astype(np.float32))
        weight = rng.uniform(0.02, 0.16)
        cloud += weight * np.asarray(coarse.resize((side, side), Image.Resampling.BICUBIC))
    frame = CanvasFrame(*((3, 4), (1, 1), (4, 3), (5, 6), (6, 5))[rng.integers(5)])
    return np.where(_picture(frame, side), np.clip(cloud + rng.uniform(0.2, 0.6), 0, 1), 0), frame


def _picture(frame: CanvasFrame, side: int) -> np.ndarray:
    """Where the canvas holds the picture rather than padding, [side, side] bool."""
    x0, y0, x1, y1 = frame.picture
    grid = (np.arange(side) + 0.5) / side
    return ((grid >= y0) & (grid < y1))[:, None] & ((grid >= x0) & (grid < x1))[None, :]


def scene(rng: np.random.Generator, pool: Pool) -> tuple[np.ndarray, list[Turn]]:
    """A picture [side, side] float32 with 0 to 3 shapes, and everything that may be asked about it."""
    side = pool.canvases.shape[1]
    if rng.uniform() < 0.75:
        number = rng.integers(len(pool.canvases))
        picture, frame = pool.canvases[number].astype(np.float32) / 255, pool.frames[number]
    else:
        picture, frame = texture(rng, side)
    inside = _picture(frame, side)
    shapes: list[Shape] = []
    for cell in rng.permutation(9)[: rng.choice(4, p=(0.12, 0.33, 0.33, 0.22))]:
        shapes.append(_draw(rng, picture, frame, *divmod(int(cell), 3)))
    gain, lift = rng.uniform(0.55, 1.35), rng.uniform(-0.05, 0.08)
    picture = np.clip(picture * gain + lift * inside, 0, 1)
    grain = rng.uniform(0, 0.02) if rng.uniform() < 0.5 else rng.uniform(0.06, 0.1)
    noisy = picture + grain * rng.standard_normal(picture.shape, dtype=np.float32) * inside
    return np.clip(noisy, 0, 1), _turns(rng, shapes, frame, gain, grain > 0.05)


def _draw(rng: np.random.Generator, picture: np.ndarray, frame: CanvasFrame, row: int, column: int) -> Shape:
    """Draw one shape into a cell of `picture`, in place."""
    side = len(picture)
    x0, y0, x1, y1 = frame.picture
    x = side * (x0 + (x1 - x0) * (column + rng.uniform(0.2, 0.8)) / 3)
    y = side * (y0 + (y1 - y0) * (row + rng.uniform(0.2, 0.8)) / 3)
    large, name = bool(rng.integers(2)), SHAPES[rng.integers(len(SHAPES))]
    radius = rng.uniform(6.5, 11) if large else rng.uniform(3, 5)
    dx, dy = np.arange(side, dtype=np.float32)[None, :] - x, np.arange(side, dtype=np.float32)[:, None] - y
    bright = bool(rng.integers(2))
    strength = rng.uniform(0.12, 0.4) * (1 if bright else -1)
    picture += strength * _outline(rng, name, dx, dy, radius) * _picture(frame, side)
    return Shape(name, "bright" if bright else "dark", "large" if large else "small", ROWS[row], COLUMNS[column])


def _outline(rng: np.random.Generator, name: str, dx: np.ndarray, dy: np.ndarray, radius: float) -> np.ndarray:
    """Coverage in [0, 1] of a shape around the origin of (dx, dy), with soft edges."""
    away = np.hypot(dx, dy)
    angle = rng.uniform(0, np.pi)
    along, across = dx * np.cos(angle) + dy * np.sin(angle), dy * np.cos(angle) - dx * np.sin(angle)
    if name == "disc":
        signed = radius - away
    elif name == "ring":
        signed = 1.3 - np.abs(away - radius)
    elif name == "bar":
        signed = np.minimum(1.6 * radius - np.abs(along), 1.4 - np.abs(across))
    elif name == "cross":
        arms = np.minimum(np.abs(along), np.abs(across))
        signed = np.minimum(1.2 - arms, 1.2 * radius - np.maximum(np.abs(along), np.abs(across)))
    elif name == "block":
        signed = 0.9 * radius - np.maximum(np.abs(along), np.abs(across))
    elif name == "triangle":
        signed = np.minimum(0.55 * radius - dy, 0.5 * (dy + 1.1 * radius) - np.abs(dx) * 0.87)
    else:  # a cloud without an edge
        return np.exp(-0.5 * (along / radius) ** 2 - (across / radius) ** 2)
    return np.clip(signed / 1.5 + 0.5, 0, 1)


def _turns(rng: np.random.Generator, shapes: list[Shape], frame: CanvasFrame, gain: float, noisy: bool) -> list[Turn]:
    """Questions and answers about a scene, in random order."""
    names = [shape.name for shape in shapes]
    once = [shape for shape in shapes if names.count(shape.name) == 1]
    turns: list[Turn] = [_presence(rng, names), _presence(rng, names), _cell(rng, shapes)]
    turns.append(("How many shapes are there?", NUMBERS[len(shapes)]))
    for shape in once:
        turns.append((f"Where is the {shape.name}?", shape.place))
        turns.append((f"Which side of the picture is the {shape.name} on?", shape.column))
        turns.append((f"Is the {shape.name} bright or dark?", shape.tone))
        turns.append((f"Is there a {shape.name} at the {shape.place}?", "yes"))
        row, column = rng.integers(3), rng.integers(3)
        elsewhere = f"{ROWS[row]} {COLUMNS[column]}"
        if elsewhere != shape.place:
            turns.append((f"Is there a {shape.name} at the {elsewhere}?", "no"))
    for shape in shapes:
        turns.append((f"What shape lies at the {shape.place}?", shape.name))
    if len(shapes) == 1:
        turns.append(("What shape is seen?", shapes[0].name))
        turns.append(("How large is the shape?", shapes[0].size))
    turns.append(("Describe the picture.", _caption(rng, shapes, frame, gain, noisy)))
    turns.append(("Is the picture grainy?", "yes" if noisy else "no"))
    if not 0.85 < gain < 1.05:
        turns.append(("How is the picture exposed?", "bright" if gain > 1 else "dark"))
    turns.append(("What is the format of the picture?", _format(frame)))
    return [turns[i] for i in rng.permutation(len(turns))]


def _presence(rng: np.random.Generator, names: list[str]) -> Turn:
    absent = [name for name in SHAPES if name not in names]
    options = names if names and rng.uniform() < 0.57 else absent
    name = options[rng.integers(len(options))]
    question = ("Is there a {}?", "Does this picture show a {}?")[rng.integers(2)].format(name)
    return question, "yes" if name in names else "no"


def _cell(rng: np.random.Generator, shapes: list[Shape]) -> Turn:
    place = f"{ROWS[rng.integers(3)]} {COLUMNS[rng.integers(3)]}"
    there = [shape.name for shape in shapes if shape.place == place]
    return f"What shape lies at the {place}?", there[0] if there else "none"


def _caption(rng: np.random.Generator, shapes: list[Shape], frame: CanvasFrame, gain: float, noisy: bool) -> str:
    parts = [f"A {'grainy ' if noisy else ''}picture in {_format(frame)} format."]
    for i in rng.permutation(len(shapes)):
        shape = shapes[i]
        parts.append(f"A {shape.size} {shape.tone} {shape.name} at the {shape.place}.")
    return " ".join(parts)


def _format(frame: CanvasFrame) -> str:
    if frame.width == frame.height:
        return "square"
    return "portrait" if frame.width < frame.height else "landscape"
