"""Converters from published data sets to shards: one file per data set; `convert.convert` runs any of them."""

from __future__ import annotations

from medalign.datasets import iu_xray, jsonl, llava, mimic_cxr, omnimedvqa, pathvqa, r2gen, slake, vqa_rad
from medalign.datasets.base import DatasetConverter
from medalign.errors import ConfigError

_MODULES = (jsonl, iu_xray, r2gen, mimic_cxr, slake, vqa_rad, pathvqa, omnimedvqa, llava)
REGISTRY: dict[str, DatasetConverter] = {module.CONVERTER.name: module.CONVERTER for module in _MODULES}


def get_converter(name: str) -> DatasetConverter:
    """Return the converter with this name.

    Raises:
        ConfigError: there is no such converter. The message lists the names.
    """
    if name not in REGISTRY:
        raise ConfigError(f"there is no converter {name!r}; choose one of {', '.join(REGISTRY)}")
    return REGISTRY[name]
