"""Generic pictures with generic captions, which the base student sees instead of medical lessons.

Plain shapes are drawn over radiographs and over random textures. The captions and questions are about the shapes, the
picture's format and its exposure, never about disease. Positions refer to the picture, so the student learns that words
refer to places, but not the patient's sides. The texts keep the spelling with which the packaged student was trained
("grey", "centre"). Arrays are [side, side] float32 in [0, 1].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from PIL import Image

from medalign.geometry import CanvasFrame, square_canvas

SHAPES = ("disc", "ring", "bar", "cross", "patch")
TONES = ("bright", "dark")
GRAYS, LEVELS = ("black", "dark", "grey", "light", "white"), (0.2, 0.32, 0.44, 0.58)
ROWS, COLUMNS = ("top", "middle", "bottom"), ("left", "right")
NUMBERS = ("no", "one", "two", "three")
SIDES, ZONES = ("right", "left"), ("upper", "middle", "lower")


class Turn(NamedTuple):
    """A question, its answer, and the part of the picture that it is about."""

    question: str
    answer: str
    region: np.ndarray | None = None  # [side, side] float32 in [0, 1]


@dataclass(frozen=True)
class Pool:
    """Radiographs on their canvases, rendered once."""

    canvases: np.ndarray  # [P, side, side] uint8
    frames: list[CanvasFrame]


@dataclass(frozen=True)
class Shape:
    """One shape, and the cell of a 3 x 2 grid over the picture that contains its center."""

    name: str
    tone: str
    size: str
    row: str
    column: str
    zone: str | None  # the part of a chest film that contains its center
    outline: np.ndarray  # [side, side] float32 in [0, 1]

    @property
    def place(self) -> str:
        """Row and column in words."""
        return f"{self.row} {self.column}"


def fit(image: Image.Image, side: int) -> tuple[np.ndarray, CanvasFrame]:
    """Put an image on its square canvas and resize it to side x side, gray, uint8."""
    canvas = square_canvas(image).convert("L").resize((side, side), Image.Resampling.BICUBIC)
    return np.asarray(canvas), CanvasFrame(*image.size)


def texture(rng: np.random.Generator, side: int) -> tuple[np.ndarray, CanvasFrame]:
    """Draw clouds at several scales on a film of random format."""
    cloud = np.zeros((side, side), dtype=np.float32)
    for cells in (2, 5, 12):
        coarse = Image.fromarray(rng.standard_normal((cells, cells)).astype(np.float32))
        weight = rng.uniform(0.02, 0.16)
        cloud += weight * np.asarray(coarse.resize((side, side), Image.Resampling.BICUBIC))
    frame = CanvasFrame(*((3, 4), (1, 1), (4, 3), (5, 6), (6, 5))[rng.integers(5)])
    return np.where(_picture(frame, side), np.clip(cloud + rng.uniform(0.2, 0.6), 0, 1), 0), frame


def _picture(frame: CanvasFrame, side: int) -> np.ndarray:
    """Return where the canvas shows the picture and not padding, [side, side] bool."""
    x0, y0, x1, y1 = frame.picture
    grid = (np.arange(side) + 0.5) / side
    return ((grid >= y0) & (grid < y1))[:, None] & ((grid >= x0) & (grid < x1))[None, :]


@dataclass(frozen=True)
class Scene:
    """A picture, questions about it, and where each kind and tone of shape covers it."""

    picture: np.ndarray  # [side, side] float32
    turns: list[Turn]
    cover: np.ndarray  # [len(SHAPES) + len(TONES), side, side] float32 in [0, 1]


def scene(rng: np.random.Generator, pool: Pool) -> Scene:
    """Draw a radiograph or a texture with 0 to 3 shapes, in random exposure."""
    side = pool.canvases.shape[1]
    radiograph = rng.uniform() < 0.75
    if radiograph:
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
    turns = _turns(rng, shapes, frame, side, gain, grain > 0.04) + _grays(rng, picture, frame)
    if radiograph:
        turns += _zone_grays(rng, picture, frame) + _zone_shapes(rng, shapes)
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
    radius = rng.uniform(10, 13) if large else rng.uniform(6, 8)
    dx, dy = np.arange(side, dtype=np.float32)[None, :] - x, np.arange(side, dtype=np.float32)[:, None] - y
    outline = _outline(rng, SHAPES[kind], dx, dy, radius) * _picture(frame, side)
    zone = next(
        (
            name
            for name, (top, bottom, start, end) in _zones(frame, side).items()
            if top <= y < bottom and start <= x < end
        ),
        None,
    )
    target = rng.uniform(0.85, 1.0) if tone == 0 else rng.uniform(0.0, 0.1)
    picture += rng.uniform(0.5, 1.0) * outline * (target - picture)
    for channel in (kind, len(SHAPES) + tone):
        cover[channel] = np.maximum(cover[channel], outline)
    return Shape(SHAPES[kind], TONES[tone], "large" if large else "small", ROWS[row], COLUMNS[column], zone, outline)


def _outline(rng: np.random.Generator, name: str, dx: np.ndarray, dy: np.ndarray, radius: float) -> np.ndarray:
    """Return the coverage in [0, 1] of a shape around the origin of (dx, dy), with soft edges."""
    away = np.hypot(dx, dy)
    angle = rng.uniform(0, np.pi)
    along, across = dx * np.cos(angle) + dy * np.sin(angle), dy * np.cos(angle) - dx * np.sin(angle)
    if name == "disc":
        signed = radius - away
    elif name == "ring":
        signed = 1.8 - np.abs(away - radius)
    elif name == "bar":
        signed = np.minimum(1.6 * radius - np.abs(along), 2.0 - np.abs(across))
    elif name == "cross":
        arms = np.minimum(np.abs(along), np.abs(across))
        signed = np.minimum(1.8 - arms, 1.2 * radius - np.maximum(np.abs(along), np.abs(across)))
    else:  # a cloud without an edge
        return np.exp(-0.5 * (along / radius) ** 2 - (across / radius) ** 2)
    return np.clip(signed / 1.5 + 0.5, 0, 1)


def _turns(
    rng: np.random.Generator, shapes: list[Shape], frame: CanvasFrame, side: int, gain: float, noisy: bool
) -> list[Turn]:
    """Ask about shapes, format and exposure."""
    names = [shape.name for shape in shapes]
    turns = [_presence(rng, shapes), _presence(rng, shapes), _cell(rng, shapes, frame, side)]
    turns.append(Turn("How many shapes are there?", NUMBERS[len(shapes)], _union(shapes)))
    for shape in shapes:
        turns.append(Turn(f"What shape lies at the {shape.place}?", shape.name, shape.outline))
        if names.count(shape.name) == 1:
            turns += _about(rng, shape, frame, side)
    if len(shapes) == 1:
        turns.append(Turn("What shape is seen?", shapes[0].name, shapes[0].outline))
        turns.append(Turn("How large is the shape?", shapes[0].size, shapes[0].outline))
    turns.append(Turn("Describe the picture.", _caption(shapes, frame, noisy)))
    whole = [Turn("Is the picture grainy?", "yes" if noisy else "no")]
    whole.append(Turn("What is the format of the picture?", _format(frame)))
    if not 0.85 < gain < 1.05:
        whole.append(Turn("How is the picture exposed?", "bright" if gain > 1 else "dark"))
    return [*turns, whole[rng.integers(len(whole))]]


def _about(rng: np.random.Generator, shape: Shape, frame: CanvasFrame, side: int) -> list[Turn]:
    """Ask about a shape that is the only one of its kind."""
    name, outline = shape.name, shape.outline
    turns = [
        Turn(f"Where is the {name}?", shape.place, outline),
        Turn(f"Which side of the picture is the {name} on?", shape.column, outline),
        Turn(f"Is the {name} bright or dark?", shape.tone, outline),
        Turn(f"Is there a {name} at the {shape.place}?", "yes", outline),
    ]
    row, column = int(rng.integers(len(ROWS))), int(rng.integers(len(COLUMNS)))
    elsewhere = f"{ROWS[row]} {COLUMNS[column]}"
    if elsewhere != shape.place:
        region = _rectangle(side, *_cell_edges(frame, side, row, column))
        turns.append(Turn(f"Is there a {name} at the {elsewhere}?", "no", region))
    return turns


def _union(shapes: list[Shape]) -> np.ndarray | None:
    return np.maximum.reduce([shape.outline for shape in shapes]) if shapes else None


def _rectangle(side: int, top: int, bottom: int, start: int, end: int) -> np.ndarray:
    region = np.zeros((side, side), np.float32)
    region[top:bottom, start:end] = 1
    return region


def _cell_edges(frame: CanvasFrame, side: int, row: int, column: int, columns: int = 2) -> tuple[int, int, int, int]:
    """Return top, bottom, start and end of a cell of the 3 x `columns` grid over the picture."""
    x0, y0, x1, y1 = frame.picture
    y, x = (
        np.linspace(side * lo, side * hi, n + 1).round().astype(int)
        for lo, hi, n in ((y0, y1, len(ROWS)), (x0, x1, columns))
    )
    return y[row], y[row + 1], x[column], x[column + 1]


def _zones(frame: CanvasFrame, side: int) -> dict[str, tuple[int, int, int, int]]:
    """Return the edges of the six zones of a chest film. The patient's right is on the left of the picture."""
    x0, y0, x1, y1 = (side * edge for edge in frame.picture)
    zones = {}
    for i, zone in enumerate(ZONES):
        top, bottom = (round(y0 + (y1 - y0) * (0.12 + 0.23 * edge)) for edge in (i, i + 1))
        for name, (start, end) in zip(SIDES, ((0.13, 0.42), (0.58, 0.87)), strict=True):
            zones[f"{name} {zone} zone"] = (top, bottom, round(x0 + (x1 - x0) * start), round(x0 + (x1 - x0) * end))
    return zones


def _grays(rng: np.random.Generator, picture: np.ndarray, frame: CanvasFrame) -> list[Turn]:
    """Ask about the gray level of a place: the simplest way to learn that words refer to places in a picture."""
    side, columns = len(picture), ("left", "centre", "right")
    names = [f"{row} {column}" for row in ROWS for column in columns]
    regions = [_rectangle(side, *_cell_edges(frame, side, *divmod(cell, 3), 3)) for cell in range(9)]
    gray = [float(picture[region > 0].mean()) for region in regions]
    turns = []
    for i in rng.permutation(9)[:2]:
        turns.append(Turn(f"How light is the {names[i]}?", GRAYS[np.searchsorted(LEVELS, gray[i])], regions[i]))
    i, j = rng.permutation(9)[:2]
    if abs(gray[i] - gray[j]) > 0.06:
        question = f"Is the {names[i]} lighter than the {names[j]}?"
        turns.append(Turn(question, "yes" if gray[i] > gray[j] else "no", regions[i] + regions[j]))
    return turns


def _zone_grays(rng: np.random.Generator, picture: np.ndarray, frame: CanvasFrame) -> list[Turn]:
    """Ask about gray levels, with the words for the zones of a chest film."""
    side, zones = len(picture), _zones(frame, len(picture))
    regions = {name: _rectangle(side, *edges) for name, edges in zones.items()}
    gray = {name: float(picture[region > 0].mean()) for name, region in regions.items()}
    turns = []
    for i in rng.permutation(len(ZONES))[:2]:
        j = int(rng.integers(2))
        name, other = (f"{SIDES[k]} {ZONES[i]} zone" for k in (j, 1 - j))
        both = regions[name] + regions[other]
        turns.append(Turn(f"How light is the {name}?", GRAYS[np.searchsorted(LEVELS, gray[name])], regions[name]))
        if abs(gray[name] - gray[other]) > 0.025:
            lighter = SIDES[j if gray[name] > gray[other] else 1 - j]
            turns.append(Turn(f"Which {ZONES[i]} zone is lighter?", lighter, both))
            turns.append(Turn(f"Is the {name} lighter than the {other}?", "yes" if lighter == SIDES[j] else "no", both))
    return turns


def _zone_shapes(rng: np.random.Generator, shapes: list[Shape]) -> list[Turn]:
    """Ask where shapes are, with the words for the zones of a chest film."""
    names, turns = [shape.name for shape in shapes], []
    for shape in shapes:
        if not shape.zone:
            continue
        turns.append(Turn(f"What shape is seen in the {shape.zone}?", shape.name, shape.outline))
        if names.count(shape.name) == 1:
            lung = shape.zone.split()[0]
            turns.append(Turn(f"In which zone is the {shape.name}?", shape.zone, shape.outline))
            turns.append(Turn(f"Which lung is the {shape.name} in?", lung, shape.outline))
            asked = SIDES[int(rng.integers(2))]
            turns.append(
                Turn(f"Is there a {shape.name} in the {asked} lung?", "yes" if asked == lung else "no", shape.outline)
            )
    return turns


def _presence(rng: np.random.Generator, shapes: list[Shape]) -> Turn:
    names = [shape.name for shape in shapes]
    absent = [name for name in SHAPES if name not in names]
    options = names if names and rng.uniform() < 0.57 else absent
    name = options[rng.integers(len(options))]
    question = ("Is there a {}?", "Does this picture show a {}?")[rng.integers(2)].format(name)
    found = [shape for shape in shapes if shape.name == name]
    return Turn(question, "yes" if found else "no", _union(found))


def _cell(rng: np.random.Generator, shapes: list[Shape], frame: CanvasFrame, side: int) -> Turn:
    row, column = int(rng.integers(len(ROWS))), int(rng.integers(len(COLUMNS)))
    place = f"{ROWS[row]} {COLUMNS[column]}"
    there = [shape.name for shape in shapes if shape.place == place]
    region = _rectangle(side, *_cell_edges(frame, side, row, column))
    return Turn(f"What shape lies at the {place}?", there[0] if there else "none", region)


def _caption(shapes: list[Shape], frame: CanvasFrame, noisy: bool) -> str:
    """Describe format and grain, then the shapes row by row."""
    parts = [f"A {'grainy ' if noisy else ''}picture in {_format(frame)} format."]
    parts += [f"A {shape.size} {shape.tone} {shape.name} at the {shape.place}." for shape in shapes]
    return " ".join(parts)


def _format(frame: CanvasFrame) -> str:
    if frame.width == frame.height:
        return "square"
    return "portrait" if frame.width < frame.height else "landscape"
