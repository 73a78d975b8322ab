"""The layout of a run's folder. No other file of the package spells the names below.

RUN/
  config.yaml               every setting of the run
  metrics.jsonl             one row per logged step
  lock                      held by the training that uses the folder
  profile/                  traces of torch.profiler, if asked for
  wandb_run_id              the id under which a resumed run continues in W&B (whose own files are in wandb/)
  checkpoints/
    latest                  name of the newest complete checkpoint
    best                    name of the checkpoint with the lowest loss on held-out shards, if any was evaluated
    step-000500/
      state/                DeepSpeed's shards
      export/               the trained student, as `medalign export` writes it
      progress.json         where the run stood
      config.yaml           the settings it was trained with
      complete.json         written last: size and SHA-256 of every file above
  evaluation/
    NAME/                   of the run's latest checkpoint when it was evaluated
      predictions.jsonl
      scores.json
    step-000500-NAME/       of that checkpoint
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

_CONFIG = "config.yaml"
_CHECKPOINTS = "checkpoints"
_EVALUATION = "evaluation"
_STEP = re.compile(r"step-(\d+)")


@dataclass(frozen=True)
class EvaluationFolder:
    """RUN/evaluation/NAME: one scored data set."""

    path: Path

    @property
    def predictions(self) -> Path:
        """One prediction per line."""
        return self.path / "predictions.jsonl"

    @property
    def scores(self) -> Path:
        """The scores and what they were measured on."""
        return self.path / "scores.json"


@dataclass(frozen=True)
class CheckpointFolder:
    """RUN/checkpoints/step-N: one checkpoint."""

    path: Path

    STATE = "state"  # DeepSpeed calls it the tag

    @property
    def step(self) -> int:
        """Steps that the run had taken."""
        return int(self.path.name.partition("-")[2])

    @property
    def export(self) -> Path:
        """Folder of the trained student."""
        return self.path / "export"

    @property
    def progress(self) -> Path:
        """Where the run stood."""
        return self.path / "progress.json"

    @property
    def config(self) -> Path:
        """Every setting that the run was trained with up to this step."""
        return self.path / _CONFIG

    @property
    def marker(self) -> Path:
        """Size and SHA-256 of every other file. It is written last: without it, a checkpoint is not complete."""
        return self.path / "complete.json"


@dataclass(frozen=True)
class CheckpointsFolder:
    """RUN/checkpoints: the checkpoints of a run."""

    path: Path

    @property
    def latest(self) -> Path:
        """The file that names the newest complete checkpoint."""
        return self.path / "latest"

    @property
    def best(self) -> Path:
        """The file that names the checkpoint with the lowest loss on held-out shards."""
        return self.path / "best"

    def read_latest(self) -> CheckpointFolder | None:
        """The checkpoint that `latest` names, whether it exists or not; None where no file names one."""
        name = self.latest.read_text(errors="replace").strip() if self.latest.is_file() else ""
        return CheckpointFolder(self.path / name) if _STEP.fullmatch(name) else None

    def step(self, step: int) -> CheckpointFolder:
        """The checkpoint after that many steps."""
        return CheckpointFolder(self.path / f"step-{step:06d}")

    def by_step(self) -> dict[int, CheckpointFolder]:
        """The checkpoints on disk by step, in ascending order."""
        found = {int(match[1]): path for path in self.path.glob("step-*") if (match := _STEP.fullmatch(path.name))}
        return {step: CheckpointFolder(found[step]) for step in sorted(found)}


@dataclass(frozen=True)
class RunFolder:
    """The folder of a run."""

    path: Path

    @property
    def config(self) -> Path:
        """Every setting of the run."""
        return self.path / _CONFIG

    @property
    def metrics(self) -> Path:
        """One row of numbers per logged step."""
        return self.path / "metrics.jsonl"

    @property
    def lock(self) -> Path:
        """Locked while a training uses the folder."""
        return self.path / "lock"

    @property
    def profile(self) -> Path:
        """Traces of torch.profiler."""
        return self.path / "profile"

    @property
    def wandb_run_id(self) -> Path:
        """The run's id in W&B."""
        return self.path / "wandb_run_id"

    @property
    def checkpoints(self) -> CheckpointsFolder:
        """The checkpoints."""
        return CheckpointsFolder(self.path / _CHECKPOINTS)

    @property
    def evaluation_root(self) -> Path:
        """The folder of all evaluations."""
        return self.path / _EVALUATION

    def evaluation(self, name: str) -> EvaluationFolder:
        """The evaluation of that name."""
        return EvaluationFolder(self.evaluation_root / name)

    def evaluations(self, prefix: str = "") -> list[EvaluationFolder]:
        """The evaluations with scores whose names begin with `prefix`, sorted by name."""
        found = [EvaluationFolder(folder) for folder in sorted(self.evaluation_root.glob(f"{prefix}*"))]
        return [evaluation for evaluation in found if evaluation.scores.is_file()]


def find_run(path: Path) -> tuple[RunFolder, str]:
    """The run folder where the evaluations of a run, a checkpoint or an export are kept, and the prefix of their names.

    Those of a checkpoint are kept in its run's folder under names that begin with its step, because the checkpoint is
    deleted once newer ones replace it. Of everything else the prefix is empty.
    """
    resolved = path.resolve()
    for folder in (resolved, resolved.parent):  # a checkpoint, or the export in it
        if folder.parent.name == _CHECKPOINTS and folder.name.startswith("step-"):
            return RunFolder(folder.parents[1]), f"{folder.name}-"
    return RunFolder(path), ""
