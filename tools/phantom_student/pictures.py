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

SHAPES = ("disc", "ring", "bar", "cross", "patch")
TONES = ("bright", "dark")
GREYS, LEVELS = ("black", "dark", "grey", "light", "white"), (0.2, 0.32, 0.44, 0.58)
ROWS, COLUMNS = ("top", "middle", "bottom"), ("left", "right")
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


@dataclass(frozen=True)
class Scene:
    """A picture, what may be asked about it, and where each kind and tone of shape covers it."""

    picture: np.ndarray  # [side, side] float32
    turns: list[Turn]
    cover: np.ndarray  # [len(SHAPES) + len(TONES), side, side] float32 in [0, 1]


def scene(rng: np.random.Generator, pool: Pool) -> Scene:
    """A radiograph or a texture with 0 to 3 shapes, in random exposure."""
    side = pool.canvases.shape[1]
    if rng.uniform() < 0.75:
        number = rng.integers(len(pool.canvases))
        picture, frame = pool.canvases[number].astype(np.float32) / 255, pool.frames[number]
    else:
        picture, frame = texture(rng, side)
    inside = _picture(frame, side)
    gain, lift = rng.uniform(0.55, 1.35), rng.uniform(-0.05, 0.08)
    picture = np.clip(picture * gain + lift * inside, 0, 1)
    cover = np.zeros((len(SHAPES) + len(TONES), side, side), dtype=np.float32)
    cells = sorted(rng.permutation(len(ROWS) * len(COLUMNS))[: rng.choice(4, p=(0.1, 0.4, 0.3, 0.2))])
    shapes = [_draw(rng, picture, cover, frame, *divmod(int(cell), len(COLUMNS))) for cell in cells]
    grain = rng.uniform(0, 0.02) if rng.uniform() < 0.6 else rng.uniform(0.05, 0.08)
    noisy = picture + grain * rng.standard_normal(picture.shape, dtype=np.float32) * inside
    turns = _turns(rng, shapes, frame, gain, grain > 0.04) + _greys(rng, picture, frame)
    return Scene(np.clip(noisy, 0, 1), [turns[i] for i in rng.permutation(len(turns))], cover)


def _draw(
    rng: np.random.Generator, picture: np.ndarray, cover: np.ndarray, frame: CanvasFrame, row: int, column: int
) -> Shape:
    """Draw one shape into a cell of `picture` and its outline into `cover`, in place."""
    side = len(picture)
    x0, y0, x1, y1 = frame.picture
    x = side * (x0 + (x1 - x0) * (column + rng.uniform(0.2, 0.8)) / len(COLUMNS))
    y = side * (y0 + (y1 - y0) * (row + rng.uniform(0.2, 0.8)) / len(ROWS))
    large, kind, tone = bool(rng.integers(2)), int(rng.integers(len(SHAPES))), int(rng.integers(2))
    radius = rng.uniform(8, 12) if large else rng.uniform(4, 6)
    dx, dy = np.arange(side, dtype=np.float32)[None, :] - x, np.arange(side, dtype=np.float32)[:, None] - y
    outline = _outline(rng, SHAPES[kind], dx, dy, radius) * _picture(frame, side)
    target = rng.uniform(0.85, 1.0) if tone == 0 else rng.uniform(0.0, 0.1)
    picture += rng.uniform(0.35, 0.9) * outline * (target - picture)
    for channel in (kind, len(SHAPES) + tone):
        cover[channel] = np.maximum(cover[channel], outline)
    return Shape(SHAPES[kind], TONES[tone], "large" if large else "small", ROWS[row], COLUMNS[column])


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
    else:  # a cloud without an edge
        return np.exp(-0.5 * (along / radius) ** 2 - (across / radius) ** 2)
    return np.clip(signed / 1.5 + 0.5, 0, 1)


def _turns(rng: np.random.Generator, shapes: list[Shape], frame: CanvasFrame, gain: float, noisy: bool) -> list[Turn]:
    """Questions and answers about shapes, format and exposure."""
    names = [shape.name for shape in shapes]
    once = [shape for shape in shapes if names.count(shape.name) == 1]
    turns: list[Turn] = [_presence(rng, names), _presence(rng, names), _cell(rng, shapes)]
    turns.append(("How many shapes are there?", NUMBERS[len(shapes)]))
    for shape in once:
        turns.append((f"Where is the {shape.name}?", shape.place))
        turns.append((f"Which side of the picture is the {shape.name} on?", shape.column))
        turns.append((f"Is the {shape.name} bright or dark?", shape.tone))
        turns.append((f"Is there a {shape.name} at the {shape.place}?", "yes"))
        elsewhere = _place(rng)
        if elsewhere != shape.place:
            turns.append((f"Is there a {shape.name} at the {elsewhere}?", "no"))
    for shape in shapes:
        turns.append((f"What shape lies at the {shape.place}?", shape.name))
    if len(shapes) == 1:
        turns.append(("What shape is seen?", shapes[0].name))
        turns.append(("How large is the shape?", shapes[0].size))
    turns.append(("Describe the picture.", _caption(shapes, frame, noisy)))
    turns.append(("Is the picture grainy?", "yes" if noisy else "no"))
    if not 0.85 < gain < 1.05:
        turns.append(("How is the picture exposed?", "bright" if gain > 1 else "dark"))
    turns.append(("What is the format of the picture?", _format(frame)))
    return turns


def _greys(rng: np.random.Generator, picture: np.ndarray, frame: CanvasFrame) -> list[Turn]:
    """Questions about the grey of a place: the plainest way to learn that words can point into a picture."""
    x0, y0, x1, y1 = (len(picture) * edge for edge in frame.picture)
    y, x = (np.linspace(*ends, 4).round().astype(int) for ends in ((y0, y1), (x0, x1)))
    grey = np.array([[picture[y[i] : y[i + 1], x[j] : x[j + 1]].mean() for j in range(3)] for i in range(3)])
    turns, columns = [], ("left", "centre", "right")
    for cell in rng.permutation(9)[:4]:
        i, j = divmod(int(cell), 3)
        turns.append((f"How light is the {ROWS[i]} {columns[j]}?", GREYS[np.searchsorted(LEVELS, grey[i, j])]))
    (i, j), (k, m) = (divmod(int(cell), 3) for cell in rng.permutation(9)[:2])
    if abs(grey[i, j] - grey[k, m]) > 0.06:
        question = f"Is the {ROWS[i]} {columns[j]} lighter than the {ROWS[k]} {columns[m]}?"
        turns.append((question, "yes" if grey[i, j] > grey[k, m] else "no"))
    left, right = grey[:, 0].mean(), grey[:, 2].mean()
    if abs(left - right) > 0.03:
        turns.append(("Which side of the picture is lighter?", "left" if left > right else "right"))
    return turns


def _presence(rng: np.random.Generator, names: list[str]) -> Turn:
    absent = [name for name in SHAPES if name not in names]
    options = names if names and rng.uniform() < 0.57 else absent
    name = options[rng.integers(len(options))]
    question = ("Is there a {}?", "Does this picture show a {}?")[rng.integers(2)].format(name)
    return question, "yes" if name in names else "no"


def _place(rng: np.random.Generator) -> str:
    return f"{ROWS[rng.integers(len(ROWS))]} {COLUMNS[rng.integers(len(COLUMNS))]}"


def _cell(rng: np.random.Generator, shapes: list[Shape]) -> Turn:
    place = _place(rng)
    there = [shape.name for shape in shapes if shape.place == place]
    return f"What shape lies at the {place}?", there[0] if there else "none"


def _caption(shapes: list[Shape], frame: CanvasFrame, noisy: bool) -> str:
    """Format and grain, then the shapes row by row."""
    parts = [f"A {'grainy ' if noisy else ''}picture in {_format(frame)} format."]
    parts += [f"A {shape.size} {shape.tone} {shape.name} at the {shape.place}." for shape in shapes]
    return " ".join(parts)


def _format(frame: CanvasFrame) -> str:
    if frame.width == frame.height:
        return "square"
    return "portrait" if frame.width < frame.height else "landscape"
