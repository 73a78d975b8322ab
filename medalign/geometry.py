"""Conversions between pixels, the square canvas, patch grids and token positions.

Student and teacher must see the same pixels at patch i. Both therefore see one square canvas: the image, centered and
padded to a square. Every view is a resized copy of this canvas, so patch grids of any resolution cover the same area,
and converting from one grid to another is a bilinear resampling.

Shape suffixes: I images, M teacher patches, N student image tokens, B samples, L tokens, D channels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

Box = Sequence[float]  # x0, y0, x1, y1 in pixels of the upright image
PIXELS = "pixels"  # the name of its pixels among the inputs of a tower


@dataclass(frozen=True)
class PatchGrid:
    """A grid of patches over the canvas, row-major: patch i is at row i // columns, column i % columns."""

    rows: int
    columns: int

    @property
    def size(self) -> int:
        """Number of patches."""
        return self.rows * self.columns


@dataclass(frozen=True)
class CanvasFrame:
    """Position of an image of width x height pixels on its square canvas of `side` pixels."""

    width: int
    height: int

    @property
    def side(self) -> int:
        """Side length of the canvas in pixels."""
        return max(self.width, self.height)

    @property
    def left(self) -> int:
        """Padding on the left in pixels."""
        return (self.side - self.width) // 2

    @property
    def top(self) -> int:
        """Padding at the top in pixels."""
        return (self.side - self.height) // 2

    def clip(self, box: Box) -> Box:
        """Return the part of a box in image pixels that is inside the image; empty boxes have no positive side."""
        x0, y0, x1, y1 = box
        return max(x0, 0.0), max(y0, 0.0), min(x1, float(self.width)), min(y1, float(self.height))

    def to_unit(self, box: Box) -> tuple[float, float, float, float]:
        """Convert a box in image pixels to fractions of the canvas, each in [0, 1]."""
        x0, y0, x1, y1 = box
        return (
            (x0 + self.left) / self.side,
            (y0 + self.top) / self.side,
            (x1 + self.left) / self.side,
            (y1 + self.top) / self.side,
        )

    @property
    def picture(self) -> tuple[float, float, float, float]:
        """The area of the image, without the padding, in fractions of the canvas."""
        return self.to_unit((0, 0, self.width, self.height))


def square_canvas(image: Image.Image, fill: tuple[int, int, int] = (0, 0, 0)) -> Image.Image:
    """Center an image on a square with its longer side, padded with `fill`.

    Returns:
        The canvas in mode RGB, or the image itself if it is square and gray.
    """
    if image.mode == "L" and image.width == image.height:
        return image  # resizing one channel gives the same values as resizing three equal ones, in a third of the time
    image = image.convert("RGB")
    frame = CanvasFrame(*image.size)
    if frame.width == frame.height:
        return image
    canvas = Image.new("RGB", (frame.side, frame.side), fill)
    canvas.paste(image, (frame.left, frame.top))
    return canvas


def resize(image: Image.Image, size: int, resample: Image.Resampling = Image.Resampling.BICUBIC) -> np.ndarray:
    """Resize to size x size with a filter of Pillow; uint8 [S, S, 3], or [S, S] for a gray image."""
    if image.mode == "L" and image.width == image.height != size:
        return _resize_gray(image, size, resample)
    return np.array(image.resize((size, size), resample))


def _resize_gray(image: Image.Image, size: int, resample: Image.Resampling) -> np.ndarray:
    """Resize a square gray image to the same pixels as `image.resize`, in three quarters of the time.

    Pillow resizes first the rows and then the columns (an image that is not square may start with the columns), and it
    resizes four bands together faster than one after another. So the quarters of the rows become the bands of one
    image, and then groups of four columns become the bands of another.
    """
    side = image.width
    quarter, pixels = -(-side // 4), -(-size // 4)
    strips = [image.crop((0, quarter * i, side, quarter * (i + 1))) for i in range(4)]
    narrow = Image.merge("CMYK", strips).resize((size, quarter), resample)
    rows = np.zeros((4 * quarter, 4 * pixels), np.uint8)
    rows.reshape(4, quarter, -1)[:, :, :size] = np.asarray(narrow).transpose(2, 0, 1)
    columns = Image.frombuffer("CMYK", (pixels, side), rows[:side], "raw", "CMYK", 0, 1)
    return np.asarray(columns.resize((pixels, size), resample)).reshape(size, -1)[:, :size]


@dataclass(frozen=True)
class PreprocessCfg:
    """How a vision tower takes its pixels: the input size, and the normalization of RGB values in [0, 1].

    Attributes:
        size: pixels per side, S.
        mean: subtracted from each channel.
        std: divides each channel after that.
        resample: filter of Pillow that resizes the image.
    """

    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    resample: Image.Resampling = Image.Resampling.BICUBIC

    @property
    def mean_color(self) -> tuple[int, int, int]:
        """The RGB color, 0 to 255, that becomes (about) zero."""
        red, green, blue = (int(value * 255) for value in self.mean)
        return red, green, blue

    def view(self, canvas: Image.Image) -> torch.Tensor:
        """The canvas (RGB, or L for equal channels) resized and normalized: float32 [3, S, S]."""
        values = torch.from_numpy(resize(canvas, self.size, self.resample).astype(np.float32))
        pixels = (values.permute(2, 0, 1) if values.ndim == 3 else values[None]) / 255
        return (pixels - torch.tensor(self.mean).view(3, 1, 1)) / torch.tensor(self.std).view(3, 1, 1)

    def inputs(self, canvas: Image.Image, where: str = "") -> Mapping[str, torch.Tensor]:
        """The view of a canvas by name, for a tower that reads pixels; `where` names the sample."""
        return {PIXELS: self.view(canvas)}

    def blank(self) -> Mapping[str, torch.Tensor]:
        """The same for a black canvas."""
        return self.inputs(Image.new("RGB", (self.size, self.size)))


def resample_features(features_IMD: torch.Tensor, source: PatchGrid, target: PatchGrid) -> torch.Tensor:
    """Resample patch features [I, M, D] on `source` to [I, N, D] on `target`, bilinear, `align_corners=False`."""
    if source == target:
        return features_IMD
    grid_IDhw = features_IMD.transpose(1, 2).unflatten(2, (source.rows, source.columns))
    size = (target.rows, target.columns)
    return F.interpolate(grid_IDhw, size=size, mode="bilinear", align_corners=False).flatten(2).transpose(1, 2)


def resample_map(map_IM: torch.Tensor, source: PatchGrid, target: PatchGrid) -> torch.Tensor:
    """Resample one value per patch, [I, M] on `source` to [I, N] on `target`."""
    return resample_features(map_IM[..., None], source, target)[..., 0]


def coverage(unit_boxes: Sequence[tuple[float, float, float, float]], grid: PatchGrid) -> np.ndarray:
    """Fraction of each patch that the union of the boxes covers, [N] in [0, 1]. Exact for boxes of any size.

    Boxes are in fractions of the canvas; parts outside the canvas are ignored.
    """
    scale = (grid.columns, grid.rows, grid.columns, grid.rows)
    # In units of patches, rounded so that an edge between two patches is not missed because of a rounding error.
    boxes = (np.asarray(unit_boxes, dtype=np.float64).reshape(-1, 4) * scale).round(9)
    # The edges of boxes and patches divide the canvas into cells, each fully inside or fully outside of every box.
    x, y = _cuts(boxes[:, ::2], grid.columns), _cuts(boxes[:, 1::2], grid.rows)
    inside = np.zeros((len(y) - 1, len(x) - 1), dtype=bool)
    for x0, y0, x1, y1 in boxes:
        inside |= ((y[:-1] >= y0) & (y[1:] <= y1))[:, None] & ((x[:-1] >= x0) & (x[1:] <= x1))[None, :]
    areas = inside * np.diff(y)[:, None] * np.diff(x)[None, :]
    rows = np.add.reduceat(areas, np.searchsorted(y, np.arange(grid.rows)), axis=0)
    return np.add.reduceat(rows, np.searchsorted(x, np.arange(grid.columns)), axis=1).reshape(-1)


def _cuts(edges: np.ndarray, patches: int) -> np.ndarray:
    """Positions at which one side of the canvas is divided, ascending, in units of patches."""
    return np.unique(np.concatenate([np.arange(patches + 1.0), edges.clip(0, patches).ravel()]))


def gather_images(values: torch.Tensor, cells_BL: torch.Tensor, images: int, tokens: int) -> torch.Tensor:
    """Gather the values at the cells of the images, [B, L, ...] to [I, N, ...], in the order of the batch.

    Args:
        values: [B, L, ...].
        cells_BL: True at image tokens that are cells. The images occur in ascending order and each has exactly `tokens`
            cells (the loader guarantees both).
        images: I.
        tokens: N.

    Raises:
        ValueError: the number of cells is not images * tokens.
    """
    chosen = values[cells_BL]
    if chosen.shape[0] != images * tokens:
        raise ValueError(f"{chosen.shape[0]} image tokens in the batch, expected {images} images with {tokens} each")
    return chosen.reshape(images, tokens, *chosen.shape[1:])
