"""Diseases: each kind changes the density of the chest and returns the mask of the changed pixels."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from medalign.phantom.anatomy import AIR, FLUID, Chest, smooth_noise, soft
from medalign.phantom.contracts import KINDS, SIDES, ZONES, Finding, Kind, Side, Zone

COUNTS = (0.25, 0.35, 0.25, 0.15)  # fraction of studies with 0, 1, 2 and 3 findings
FIXED_ZONE: dict[Kind, Zone] = {"effusion": "lower", "pneumothorax": "upper", "cardiomegaly": ""}
Site = tuple[Kind, Side, Zone]


def draw_sites(rng: np.random.Generator) -> list[Site]:
    """Draw the findings of a study and their sites: one of a kind per side, and one finding per zone of a lung."""
    sites: list[Site] = []
    wanted = rng.choice(len(COUNTS), p=COUNTS)
    while len(sites) < wanted:
        kind = KINDS[rng.integers(len(KINDS))]
        side: Side = "" if kind == "cardiomegaly" else SIDES[rng.integers(2)]
        zone = FIXED_ZONE.get(kind, ZONES[rng.integers(3)])
        taken = any((kind, side) == site[:2] or (side and (side, zone) == site[1:]) for site in sites)
        if not taken:
            sites.append((kind, side, zone))
    return sites


def add_finding(rng: np.random.Generator, chest: Chest, density: np.ndarray, site: Site) -> Finding:
    """Add a finding to `density` in place, and return where it is."""
    kind, side, zone = site
    if kind == "cardiomegaly":
        mask, size = chest.heart > 0.5, "large"
    else:
        large = bool(rng.integers(2))
        mask, size = _PAINTERS[kind](rng, chest, density, site, large), "large" if large else "small"
    ys, xs = np.nonzero(mask)
    box = (int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1)
    return Finding(kind, side, zone, size, box, mask)


def _center(rng: np.random.Generator, chest: Chest, site: Site) -> tuple[float, float]:
    """A point of the zone, in pixels, in aerated lung; the best of several tries."""
    _, side, zone = site
    lung, aerated = chest.lungs[side], chest.aerated(side)
    height, width = chest.shape
    low, high = lung.zone_span(ZONES.index(zone))
    margin = 0.2 * (high - low)
    u = lung.center + lung.half_width * rng.uniform(-0.75, 0.75, 12)
    v = np.maximum(rng.uniform(low + margin, high - margin, 12), lung.apex + 0.08)
    x, y = (u * width).astype(int).clip(0, width - 1), (v * height).astype(int).clip(0, height - 1)
    best = int(np.argmax(aerated[y, x] > 0.9))
    return float(x[best]), float(y[best])


def _distance(chest: Chest, x: float, y: float) -> np.ndarray:
    """Distance from (x, y) in pixels, [height, width]."""
    height, width = chest.shape
    dx = np.arange(width, dtype=np.float32)[None, :] - x
    dy = np.arange(height, dtype=np.float32)[:, None] - y
    distance: np.ndarray = np.sqrt(dx * dx + dy * dy)
    return distance


def _nodule(rng: np.random.Generator, chest: Chest, density: np.ndarray, site: Site, large: bool) -> np.ndarray:
    x, y = _center(rng, chest, site)
    radius = rng.uniform(7.0, 9.0) if large else rng.uniform(5.0, 6.5)
    away = _distance(chest, x, y)
    density += rng.uniform(0.26, 0.40) * soft((radius - away) / 2)
    return away <= radius


def _consolidation(rng: np.random.Generator, chest: Chest, density: np.ndarray, site: Site, large: bool) -> np.ndarray:
    x, y = _center(rng, chest, site)
    spread = 7.0 if large else 5.0
    cloud = np.zeros(chest.shape, dtype=np.float32)
    for _ in range(6):
        dx, dy = rng.normal(0, spread, 2)
        radius = spread * rng.uniform(1.0, 1.6)
        cloud += np.maximum(1 - _distance(chest, x + dx, y + dy) / (1.6 * radius), 0)
    cloud = np.minimum(cloud * 0.9, 1) * chest.fields[site[1]]
    texture = 0.8 + 0.35 * smooth_noise(rng, chest.shape, 24)
    density += rng.uniform(0.30, 0.42) * cloud * texture
    return _own(cloud > 0.4, round(x), round(y))


def _effusion(rng: np.random.Generator, chest: Chest, density: np.ndarray, site: Site, large: bool) -> np.ndarray:
    """Fluid below a level that rises towards the chest wall, within the ellipse down to the costophrenic angle."""
    lung = chest.lungs[site[1]]
    lateral = np.maximum(lung.outward * (chest.u - lung.center) / lung.half_width, -1)
    level = lung.dome - (rng.uniform(0.08, 0.13) if large else rng.uniform(0.01, 0.05)) - 0.07 * lateral
    height, width = chest.shape
    wall = soft((1 - lung.radius(chest.u, chest.v)) * (lung.half_width * width / 1.5))
    fluid = wall * soft((chest.v - level) * (height / 3)) * soft((lung.base - chest.v) * height)
    density += rng.uniform(0.7, 0.9) * fluid * (FLUID - density)
    mask: np.ndarray = fluid * (1 - chest.heart) > 0.5
    return mask


def _pneumothorax(rng: np.random.Generator, chest: Chest, density: np.ndarray, site: Site, large: bool) -> np.ndarray:
    """Air without lung markings between the chest wall and the thin line of the retracted lung."""
    lung, field = chest.lungs[site[1]], chest.fields[site[1]]
    inset = rng.uniform(0.48, 0.60) if large else rng.uniform(0.34, 0.42)
    inner = lung.radius(chest.u, chest.v, inset) - 1
    depth = lung.apex + rng.uniform(0.45, 0.6) * (lung.dome - lung.apex)
    height, width = chest.shape
    lateral = soft((lung.outward * (chest.u - lung.center) / lung.half_width + 0.5) * 4)
    extent = soft((depth - chest.v) * (height / 6)) * field * lateral
    gap = soft(inner * (lung.half_width * width / 1.5)) * extent
    density += gap * ((AIR - rng.uniform(0.19, 0.24)) - density)
    density += 0.16 * extent * np.maximum(1 - np.abs(inner) * (lung.half_width * width / 1.2), 0)
    mask: np.ndarray = gap > 0.5
    return mask


def _own(mask: np.ndarray, x: int, y: int) -> np.ndarray:
    """The mask, never empty: its center always belongs to it."""
    mask[y, x] = True
    return mask


_PAINTERS: dict[Kind, Callable[[np.random.Generator, Chest, np.ndarray, Site, bool], np.ndarray]] = {
    "nodule": _nodule,
    "effusion": _effusion,
    "consolidation": _consolidation,
    "pneumothorax": _pneumothorax,
}
