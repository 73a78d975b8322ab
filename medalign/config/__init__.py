"""The settings of a run, read from a recipe (YAML) and dotted overrides.

A recipe contains the settings of a complete run: `medalign train phantom --train.steps 50` reads the packaged recipe
`phantom`, then overrides one setting. An unknown key and a value of the wrong type or range are errors that name the
setting.
"""

from medalign.config.loading import check, describe_settings, dump, load, read
from medalign.config.recipe_files import group_recipes, recipes, summarize
from medalign.config.schema import (
    CheckpointConfig,
    Config,
    DataConfig,
    EngineConfig,
    FurtherTeacher,
    LogConfig,
    LoraConfig,
    LossConfig,
    OptimizerConfig,
    RunConfig,
    StudentConfig,
    TeacherConfig,
    TeacherSettings,
    TrainConfig,
)
from medalign.config.validation import validate

__all__ = [
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "EngineConfig",
    "FurtherTeacher",
    "LogConfig",
    "LoraConfig",
    "LossConfig",
    "OptimizerConfig",
    "RunConfig",
    "StudentConfig",
    "TeacherConfig",
    "TeacherSettings",
    "TrainConfig",
    "check",
    "describe_settings",
    "dump",
    "group_recipes",
    "load",
    "read",
    "recipes",
    "summarize",
    "validate",
]
