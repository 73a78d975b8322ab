"""Builds the objective of a run from its settings."""

from __future__ import annotations

from collections.abc import Sequence

from medalign.config import Config, LossConfig, TeacherSettings
from medalign.errors import ConfigError
from medalign.import_path import import_object
from medalign.losses.attention import AttentionTerm
from medalign.losses.language_model import LanguageTerm
from medalign.losses.objective import Objective
from medalign.losses.term import LossTerm
from medalign.losses.token_similarity import SimilarityTerm


def build_objective(config: Config) -> Objective:
    """Build the objective: the paper's terms, followed by those of `losses.extra`.

    Raises:
        ConfigError: an entry of `losses.extra` does not give a loss term, or two terms have the same name.
    """
    extra = [load_term(path, config) for path in config.losses.extra]
    try:
        return Objective([*build_terms(config.losses, [config.teacher, *config.teacher.also]), *extra])
    except ValueError as error:
        raise ConfigError(f"losses.extra {config.losses.extra}: {error}") from error


def build_terms(settings: LossConfig, teachers: Sequence[TeacherSettings] = (TeacherSettings(),)) -> list[LossTerm]:
    """Build the paper's terms: "language", and for each teacher "similarity" (alpha) and "attention" (beta).

    The terms of a further teacher are named after it: "similarity_NAME" and "attention_NAME".

    Args:
        settings: those of the losses.
        teachers: the settings of each teacher, whose weights multiply alpha and beta.

    Raises:
        ValueError: a coefficient is negative, or a setting is not one of its choices.
    """
    terms: list[LossTerm] = [LanguageTerm(mean=settings.language_mean)]
    for number, teacher in enumerate(teachers):
        suffix = f"_{getattr(teacher, 'name', '') or number + 1}" if number else ""
        terms.append(
            SimilarityTerm(
                settings.alpha * teacher.similarity_weight,
                name=f"similarity{suffix}",
                teacher=number,
                weighting=settings.weighting,
                ignore_padding=settings.ignore_padding,
                impl=settings.impl,
                layer_weights=settings.layer_weights,
            )
        )
        terms.append(
            AttentionTerm(
                settings.beta * teacher.attention_weight,
                name=f"attention{suffix}",
                teacher=number,
                normalize=settings.normalize,
                ignore_padding=settings.ignore_padding,
                layer_weights=settings.layer_weights,
            )
        )
    return terms


def load_term(path: str, config: Config) -> LossTerm:
    """Build a loss term with a callable from another package.

    Args:
        path: import path `package.module.factory` of a callable that takes the `Config` and returns a `LossTerm`.
        config: the configuration of the run.

    Returns:
        The term.

    Raises:
        ConfigError: the path cannot be imported, or the callable returns something else.
    """
    factory = import_object(path, "losses.extra")
    if not callable(factory):
        raise ConfigError(f"losses.extra {path!r} is not callable; give a function that takes the Config")
    term = factory(config)
    if not isinstance(term, LossTerm):
        raise ConfigError(
            f"losses.extra {path!r} returned {type(term).__name__}; it must return a medalign.losses.LossTerm"
        )
    return term
