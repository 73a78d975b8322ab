"""The healthy chest: where structures are, and how they change the density of the film.

As in any chest radiograph, the patient faces the viewer: the patient's right is on the left of the image. Coordinates:
u in [0, 1] from left to right, v in [0, 1] from top to bottom. Arrays are float32 [height, width]. Densities are added
up in one array, 0 for air and 1 for dense bone, and converted to gray levels at the end.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from medalign.phantom.contracts import SIDES, Side

ASPECTS = ((104, 128), (88, 120), (112, 112), (96, 96), (120, 104), (128, 96))  # width, height in pixels
SOFT_TISSUE, AIR, FLUID = 0.60, 0.26, 0.66


def soft(signed: np.ndarray) -> np.ndarray:
    """Return a mask with an edge one unit wide: 0 outside, 1 inside. `signed` is a distance, positive inside."""
    return np.clip(signed + 0.5, 0.0, 1.0)


@dataclass(frozen=True)
class Lung:
    """Half an ellipse with a flat base, cut from below by the dome of the diaphragm."""

    center: float  # u
    outward: int  # -1 if lateral is to the left of the image (the patient's right lung), else +1
    half_width: float
    apex: float  # v
    base: float  # v of the flat base of the ellipse, the depth of the costophrenic angle
    dome: float  # v of the top of the diaphragm

    def radius(self, u: np.ndarray, v: np.ndarray, inset: float = 0.0) -> np.ndarray:
        """Return 1 on the outline and less inside. With `inset`, the outline shrinks from chest wall and apex."""
        center = self.center - self.outward * inset * self.half_width
        x = (u - center) / (self.half_width * (1 - 0.5 * inset))
        y = np.minimum(v - self.base, 0) / ((self.base - self.apex) * (1 - 0.6 * inset))
        return np.sqrt(x * x + y * y)

    def floor(self, u: np.ndarray) -> np.ndarray:
        """Return v of the diaphragm at u."""
        return self.dome + (self.base - self.dome) * ((u - self.center) / self.half_width) ** 2

    def zone_span(self, zone: int) -> tuple[float, float]:
        """Return the range of v of a third of the lung, counted from the apex."""
        third = (self.dome - self.apex) / 3
        return self.apex + zone * third, self.apex + (zone + 1) * third


@dataclass
class Chest:
    """The anatomy of one patient on one film, without lung disease."""

    u: np.ndarray
    v: np.ndarray
    midline: float
    lungs: dict[Side, Lung]
    fields: dict[Side, np.ndarray]  # area of each lung with soft edges, including the part behind the heart
    heart: np.ndarray  # soft-edged

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width in pixels."""
        height, width = self.u.shape
        return height, width

    def aerated(self, side: Side) -> np.ndarray:
        """Return the part of the lung that the heart does not hide."""
        visible: np.ndarray = self.fields[side] * (1 - self.heart)
        return visible


def draw_chest(rng: np.random.Generator, enlarged_heart: bool) -> Chest:
    """Draw a random patient: film format, build, position, and the outlines that follow from them."""
    width, height = ASPECTS[rng.integers(len(ASPECTS))]
    tilt, midline, scale = rng.uniform(-0.05, 0.05), rng.uniform(0.46, 0.54), rng.uniform(0.92, 1.06)
    rows = ((np.arange(height, dtype=np.float32) + 0.5) / height)[:, None]
    columns = ((np.arange(width, dtype=np.float32) + 0.5) / width)[None, :]
    v = np.broadcast_to(rows, (height, width))
    u = columns + np.float32(tilt) * (rows - 0.5)
    apex, base = rng.uniform(0.07, 0.13), rng.uniform(0.82, 0.90)
    lungs, fields = {}, {}
    for side, outward in zip(SIDES, (-1, 1), strict=True):
        lung = Lung(
            center=midline + outward * scale * rng.uniform(0.20, 0.225),
            outward=outward,
            half_width=scale * rng.uniform(0.165, 0.19),
            apex=apex + rng.uniform(-0.01, 0.01),
            base=base,
            dome=base - rng.uniform(0.10, 0.15) - (0.02 if outward < 0 else 0.0),
        )
        inside = soft((1 - lung.radius(u, v)) * (lung.half_width * width / 1.5))
        lungs[side], fields[side] = lung, inside * soft((lung.floor(u) - v) * (height / 1.5))
    return Chest(u, v, midline, lungs, fields, _heart(rng, u, v, midline, base, scale, enlarged_heart))


def _heart(
    rng: np.random.Generator, u: np.ndarray, v: np.ndarray, midline: float, base: float, scale: float, enlarged: bool
) -> np.ndarray:
    """An oval that leans to the patient's left and rests on the diaphragm."""
    half_width = scale * (rng.uniform(0.19, 0.235) if enlarged else rng.uniform(0.115, 0.15))
    half_height = rng.uniform(0.16, 0.19) if enlarged else rng.uniform(0.13, 0.16)
    x = (u - midline - 0.28 * half_width) / half_width
    y = (v - base + 0.04 + half_height) / half_height
    lean = rng.uniform(-0.35, -0.2)
    return soft((1 - np.sqrt(x * x + y * y + lean * x * y)) * (half_width * u.shape[1] / 2))


def soft_tissue(rng: np.random.Generator, chest: Chest) -> np.ndarray:
    """Return the density of the trunk with its two dark lungs, without heart and bones."""
    height, width = chest.shape
    waist = rng.uniform(0.42, 0.47)
    slope = np.maximum(0.14 - chest.v, 0) * rng.uniform(1.0, 2.0)  # shoulders
    trunk = soft((waist - slope - np.abs(chest.u - chest.midline)) * (width / 4))
    density = (0.06 + (SOFT_TISSUE - 0.06) * trunk).astype(np.float32)
    for field in chest.fields.values():
        density -= (SOFT_TISSUE - AIR) * field
    return density + 0.05 * smooth_noise(rng, chest.shape, 6)


def vessels(rng: np.random.Generator, chest: Chest) -> np.ndarray:
    """Return hilar shadows and their branching vessels; vessels seen end-on look like small nodules."""
    height, width = chest.shape
    canvas = Image.new("L", (width, height))
    pen = ImageDraw.Draw(canvas)
    size = np.array((width, height))
    for lung in chest.lungs.values():
        root = np.array([lung.center - lung.outward * 0.55 * lung.half_width, 0.5 * (lung.apex + lung.dome) + 0.03])
        branches = rng.integers(7, 11)
        ways = rng.uniform((0.3, -0.26), (1.4, 0.24), (branches, 2)) * (lung.outward * lung.half_width, 1)
        bends = (root + 0.5 * ways + rng.uniform(-0.03, 0.03, (branches, 2))) * size
        tips, start = (root + ways) * size, tuple(root * size)
        for bend, tip, shade in zip(bends, tips, rng.integers(60, 150, branches).tolist(), strict=True):
            pen.line([start, tuple(bend), tuple(tip)], fill=shade, width=1)
        dots = rng.integers(2, 6)
        centers = (root + rng.normal(0, (0.06, 0.09), (dots, 2))) * size
        radii, shades = rng.uniform(0.7, 1.6, dots).tolist(), rng.integers(110, 230, dots).tolist()
        for (x, y), r, shade in zip(centers.tolist(), radii, shades, strict=True):
            pen.ellipse((x - r, y - r, x + r, y + r), fill=shade)
    return np.asarray(canvas.filter(ImageFilter.GaussianBlur(0.7)), dtype=np.float32) * (0.30 / 255)


def skeleton(rng: np.random.Generator, chest: Chest) -> np.ndarray:
    """Return ribs (posterior ones descend outwards, anterior ones ascend), spine, clavicles and sometimes a wire."""
    height, width = chest.shape
    reach = np.abs(chest.u - chest.midline)
    cage = soft((0.40 - reach) * (width / 3)) * soft((0.80 - chest.v) * (height / 5))
    spacing, strength = rng.uniform(0.085, 0.11), rng.uniform(0.04, 0.08)
    behind = (chest.v + 0.35 * (reach - 0.2) - 2.2 * (reach - 0.16) ** 2) / spacing
    front = (chest.v - rng.uniform(0.5, 0.8) * (reach - 0.15)) / (1.15 * spacing) + rng.uniform()
    bands = strength * _bands(behind) + 0.6 * strength * _bands(front)
    ribs = bands * cage * soft((reach - 0.04) * (width / 3))
    joints = 0.03 * np.cos(chest.v * (2 * np.pi / rng.uniform(0.05, 0.07)))
    spine = (rng.uniform(0.10, 0.20) + joints) * soft((0.05 - reach) * (width / 4))
    density: np.ndarray = ribs + spine + _lines(rng, chest)
    return density


def _bands(phase: np.ndarray) -> np.ndarray:
    return np.maximum(np.cos((2 * np.pi) * phase) - 0.35, 0) / 0.65


def _lines(rng: np.random.Generator, chest: Chest) -> np.ndarray:
    height, width = chest.shape
    canvas = Image.new("L", (width, height))
    pen = ImageDraw.Draw(canvas)
    for outward in (-1, 1):
        inner = ((chest.midline + outward * 0.05) * width, rng.uniform(0.13, 0.17) * height)
        outer = ((chest.midline + outward * 0.40) * width, rng.uniform(0.06, 0.12) * height)
        pen.line([inner, outer], fill=70, width=4)
    if rng.uniform() < 0.3:
        x = np.cumsum(np.concatenate([rng.uniform(0.2, 0.8, 1), rng.uniform(-0.15, 0.15, 4)])) * width
        pen.line([(float(a), b * height / 4) for b, a in enumerate(x)], fill=150, width=1)
    return np.asarray(canvas.filter(ImageFilter.GaussianBlur(0.6)), dtype=np.float32) * (0.45 / 255)


def smooth_noise(rng: np.random.Generator, shape: tuple[int, int], cells: int) -> np.ndarray:
    """Return noise of unit variance that varies over 1 / cells of the image, [height, width]."""
    coarse = rng.standard_normal((cells, cells)).astype(np.float32)
    return np.asarray(Image.fromarray(coarse).resize(shape[::-1], Image.Resampling.BICUBIC))


def expose(rng: np.random.Generator, density: np.ndarray) -> Image.Image:
    """Convert density to a film: exposure, contrast, slight blur, quantum noise."""
    film = np.clip(density * rng.uniform(0.9, 1.1) + rng.uniform(-0.02, 0.04), 0, 1) ** rng.uniform(0.85, 1.2)
    grain = rng.standard_normal(density.shape, dtype=np.float32)
    film = film + rng.uniform(0.01, 0.03) * grain
    picture = Image.fromarray((np.clip(film, 0, 1) * 255).astype(np.uint8))
    return picture.filter(ImageFilter.GaussianBlur(rng.uniform(0.2, 0.6)))
