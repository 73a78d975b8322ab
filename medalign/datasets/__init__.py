"""Converters: one file a data set; `convert` packs any of them."""

from __future__ import annotations

from medalign.datasets.base import DatasetConverter
from medalign.errors import ConfigError


def known() -> dict[str, DatasetConverter]:
    """Every source by its name on the command line."""
    from medalign.datasets import iu_xray, jsonl, llava, mimic_cxr, omnimedvqa, pathvqa, r2gen, slake, vqa_rad

    modules = (jsonl, iu_xray, r2gen, mimic_cxr, slake, vqa_rad, pathvqa, omnimedvqa, llava)
    return {module.CONVERTER.name: module.CONVERTER for module in modules}


def find(name: str) -> DatasetConverter:
    """The source of this name. Raises ConfigError that lists the known ones."""
    sources = known()
    if name not in sources:
        raise ConfigError(f"there is no source {name!r}; known are {', '.join(sources)}")
    return sources[name]
