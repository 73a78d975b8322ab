"""The GPUs that a plan can be made for, as their data sheets describe them."""

from __future__ import annotations

import re
from typing import NamedTuple

from medalign.kernels.gpu import ARCHITECTURES

_VARIANTS = {"pcie", "nvl", "mig"}  # in the name of a GPU with fewer operations per second than the SXM form


class Card(NamedTuple):
    """One GPU."""

    name: str
    memory: float  # bytes
    operations: float  # dense bf16 operations per second
    fp32_operations: float  # operations per second of float32 matrix products with TF32 disabled
    link: float  # bytes per second to the other GPUs of the node, in one direction
    source: str


_A100, _H100, _B200 = (ARCHITECTURES[name].half_operations for name in ("sm_80", "sm_90", "sm_100"))

# Memory and links from NVIDIA's data sheets; a data sheet states a link's two directions together.
CARDS = {
    "a100": Card("A100 SXM 80 GB", 80 * 2**30, _A100, 19.5e12, 300e9, "NVIDIA A100 data sheet (2021)"),
    "h100": Card("H100 SXM 80 GB", 80 * 2**30, _H100, 67e12, 450e9, "NVIDIA H100 data sheet (2023)"),
    "h200": Card("H200 SXM 141 GB", 141e9, _H100, 67e12, 450e9, "NVIDIA H200 data sheet (2024)"),
    "b200": Card("B200 SXM 180 GB", 180e9, _B200, 75e12, 900e9, "NVIDIA HGX B200 data sheet (2025)"),
}


def find_card(name: str) -> Card | None:
    """Return the card with this name, as CUDA reports it; None if it is another one, or a slower variant of one."""
    words = set(re.split(r"[^a-z0-9]+", name.lower()))
    if words & _VARIANTS:
        return None
    return next((card for key, card in CARDS.items() if key in words), None)
