"""MedAlign: distillation from a medical CLIP into a medical vision-language model.

The public Python API is what `__all__` lists. Everything else may change without notice. Each name is imported from
its module on first use, so `import medalign` is quick.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_MODULES = {
    "Config": "medalign.config",
    "load_config": "medalign.config",
    "train": "medalign.run",
    "open_student": "medalign.inference",
    "Decoding": "medalign.decoding.base",
    "generate": "medalign.inference",
    "evaluate": "medalign.evaluator",
    "load_teacher": "medalign.teacher.loading",
    "teacher_targets": "medalign.teacher.targets",
    "PatchGrid": "medalign.geometry",
    "token_similarity": "medalign.kernels",
    "attention_map": "medalign.kernels",
    "attention_kl": "medalign.losses",
}
_NAMES = {"load_config": "load"}  # public name -> name in the module, where they differ

__all__ = [  # noqa: F822 (found by __getattr__)
    "Config",
    "Decoding",
    "PatchGrid",
    "attention_kl",
    "attention_map",
    "evaluate",
    "generate",
    "load_config",
    "load_teacher",
    "open_student",
    "teacher_targets",
    "token_similarity",
    "train",
]


def __getattr__(name: str) -> Any:
    """Import a name of the public API on first use.

    Raises:
        AttributeError: the name is not public.
    """
    if name not in _MODULES:
        raise AttributeError(f"module 'medalign' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), _NAMES.get(name, name))


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
