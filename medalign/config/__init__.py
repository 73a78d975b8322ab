"""The settings of a run, read from a recipe (YAML) and dotted overrides.

A recipe is a complete run by name: `medalign train phantom --train.steps 50` reads the packaged recipe `phantom`, then
overrides one setting. A key that does not exist and a value of the wrong type or range are errors that name it.
"""

from medalign.config.loading import describe_settings, dump, load, read
from medalign.config.recipe_files import recipes
from medalign.config.schema import (
    CheckpointConfig,
    Config,
    DataConfig,
    EngineConfig,
    LogConfig,
    LoraConfig,
    LossConfig,
    OptimizerConfig,
    RunConfig,
    StudentConfig,
    TeacherConfig,
    TrainConfig,
)
from medalign.config.validation import validate

__all__ = [
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "EngineConfig",
    "LogConfig",
    "LoraConfig",
    "LossConfig",
    "OptimizerConfig",
    "RunConfig",
    "StudentConfig",
    "TeacherConfig",
    "TrainConfig",
    "describe_settings",
    "dump",
    "load",
    "read",
    "recipes",
    "validate",
]
