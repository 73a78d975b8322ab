"""Whether the chosen methods can work with a student, before its weights are read."""

from __future__ import annotations

from collections.abc import Iterable

from medalign.config import StudentConfig
from medalign.decoding.base import Greedy, Method
from medalign.student.families.registry import inspect_model
from medalign.student.loading import model_folder
from medalign.student.weights import empty_model


def require_methods(methods: Iterable[Method], config: StudentConfig) -> None:
    """Check each method with the student's parts on the meta device.

    Args:
        methods: the methods.
        config: the student's settings.

    Raises:
        ConfigError: a method cannot work with the student.
    """
    chosen = [method for method in methods if not isinstance(method, Greedy)]
    if not chosen:
        return
    spec = inspect_model(empty_model(model_folder(config), config))
    for method in chosen:
        method.check(spec, config)
