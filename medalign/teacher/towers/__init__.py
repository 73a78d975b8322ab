"""The kinds of vision towers that can be teachers: one file each, and one line in `TOWERS`."""

from __future__ import annotations

from medalign.errors import ConfigError
from medalign.teacher.source import TeacherSource
from medalign.teacher.towers.base import ClassTokenTower, Streams, TextAlignedTower, Tower
from medalign.teacher.towers.biovil import BioVilTower
from medalign.teacher.towers.hf_clip import HFClipTower
from medalign.teacher.towers.hf_dinov2 import HFDinov2Tower
from medalign.teacher.towers.hf_siglip import HFSiglipTower
from medalign.teacher.towers.open_clip_resnet import OpenClipResNetTower
from medalign.teacher.towers.open_clip_vit import OpenClipTower
from medalign.teacher.towers.pmc_clip import PmcClipTower
from medalign.teacher.towers.timm_vit import TimmTower

# By what `find_teacher` finds: kinds of open_clip, or `model_type` of transformers.
TOWERS: dict[str, type[Tower]] = {
    "open_clip": OpenClipTower,
    "resnet": OpenClipResNetTower,
    "timm": TimmTower,
    "biovil": BioVilTower,
    "pmc_clip": PmcClipTower,
    "clip": HFClipTower,
    "clip_vision_model": HFClipTower,
    "siglip": HFSiglipTower,
    "siglip_vision_model": HFSiglipTower,
    "dinov2": HFDinov2Tower,
}

__all__ = ["TOWERS", "ClassTokenTower", "Streams", "TextAlignedTower", "Tower", "tower_class"]


def tower_class(source: TeacherSource) -> type[Tower]:
    """Return the kind of tower of a source. Raises ConfigError if it is not supported."""
    if source.kind not in TOWERS:
        raise ConfigError(
            f"teacher {source.name}: its vision tower is of kind {source.kind!r}; supported kinds: "
            f"{', '.join(sorted(TOWERS))}"
        )
    return TOWERS[source.kind]
