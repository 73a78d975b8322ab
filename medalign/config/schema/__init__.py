"""The settings of a run, as dataclasses: a file per topic.

The text under a field is its documentation: `medalign train --help` and the configuration page are generated from it.
jsonargparse checks each value against the type of its field, including the range of a number.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from medalign.config.schema.data import DataConfig
from medalign.config.schema.losses import LossConfig
from medalign.config.schema.run import CheckpointConfig, EngineConfig, LogConfig, RunConfig
from medalign.config.schema.student import LoraConfig, StudentConfig
from medalign.config.schema.teacher import FurtherTeacher, TeacherConfig, TeacherSettings
from medalign.config.schema.training import OptimizerConfig, TrainConfig

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
]


@dataclass
class Config:
    """All settings of a run."""

    run: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    student: StudentConfig = field(default_factory=StudentConfig)
    losses: LossConfig = field(default_factory=LossConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    log: LogConfig = field(default_factory=LogConfig)

    @property
    def distils(self) -> bool:
        """Whether the teacher is loaded."""
        extra = bool(self.losses.extra and self.teacher.path)
        return self.losses.alpha > 0 or self.losses.beta > 0 or extra

    @property
    def teachers(self) -> list[TeacherSettings]:
        """The settings of each teacher: the first, then those of teacher.also; empty when nothing is distilled."""
        return [self.teacher, *self.teacher.also] if self.distils else []
