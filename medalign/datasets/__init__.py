"""Converters from published data sets to shards: one file per data set; `convert.convert` runs any of them.

Other packages can provide further converters, which are given by their import path.
"""

from __future__ import annotations

from dataclasses import replace

from medalign.datasets import (
    eh_benchmark,
    iu_xray,
    jsonl,
    llava,
    mimic_cxr,
    omnimedvqa,
    pathvqa,
    r2gen,
    s_chain,
    slake,
    vqa_rad,
)
from medalign.datasets.base import DatasetConverter
from medalign.errors import ConfigError
from medalign.import_path import import_object

_MODULES = (
    jsonl,
    iu_xray,
    r2gen,
    mimic_cxr,
    slake,
    vqa_rad,
    pathvqa,
    omnimedvqa,
    s_chain,
    eh_benchmark,
    llava,
)
REGISTRY: dict[str, DatasetConverter] = {module.CONVERTER.name: module.CONVERTER for module in _MODULES}


def get_converter(name: str) -> DatasetConverter:
    """Return a converter.

    Args:
        name: the name of a packaged converter, or the import path `package.module:NAME` of a `DatasetConverter`. Every
            worker process imports the path, and the converter takes it as its name.

    Raises:
        ConfigError: there is no such converter.
    """
    if is_import_path(name):
        found = import_object(name, "the converter")
        if not isinstance(found, DatasetConverter):
            raise ConfigError(
                f"the converter {name!r} is a {type(found).__name__}; give a medalign.datasets.base.DatasetConverter"
            )
        return replace(found, name=name)
    if name not in REGISTRY:
        raise ConfigError(f"there is no converter {name!r}; choose one of {', '.join(REGISTRY)}")
    return REGISTRY[name]


def is_import_path(name: str) -> bool:
    """Return whether a name is the import path of a converter from another package."""
    return ":" in name
