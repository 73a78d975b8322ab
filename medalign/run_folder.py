"""The layout of a run's folder. No other file of the package contains these names.

RUN/
  config.yaml               every setting of the run
  environment.json          batch job, number of ranks, GPU and versions of the last start
  metrics.jsonl             one row per logged step
  lock                      held by the training process that uses the folder
  logs/
    rank-0.log              the messages of each rank, of all starts
    rank-0.exit.json        exit status and reason of each rank of the last start; a rank that was killed has none
  attempts.jsonl            one row per start by `medalign supervise`: how it ended, and what followed
  stacks/rank-0.txt         where each rank was when the run was ended because it hung
  profile/                  traces of torch.profiler, if log.profile_steps is set
  wandb_run_id              the run's id in W&B, used again when the run resumes (W&B's own files are in wandb/)
  checkpoints/
    latest                  name of the newest complete checkpoint
    best                    name of the checkpoint with the lowest loss on held-out shards, if any was evaluated
    step-000500/
      state/                DeepSpeed's shards
      export/               the trained student, as `medalign export` writes it
      progress.json         steps, samples and counters of the run at this checkpoint
      config.yaml           the settings it was trained with
      complete.json         written last: size and SHA-256 of every file above
  evaluation/
    NAME/                   the evaluation of the checkpoint that was the latest at that time
      predictions.jsonl
      scores.json
      probe-PROBE.jsonl     the predictions of a probe
      grounding.json        what the attention shows, by `medalign ground`; grounding.jsonl has a line per sample, and
                            grounding_heads.csv a line per block and head
      separability.json     how well visual tokens separate, by `medalign separability`, with separability.png
    step-000500-NAME/       the evaluation of checkpoint step-000500
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

    def probe(self, name: str) -> Path:
        """Return the file with the predictions of a probe."""
        return self.path / f"probe-{name}.jsonl"

    def probes(self) -> list[Path]:
        """Return the files of all probes."""
        return list(self.path.glob("probe-*.jsonl"))

    @property
    def grounding(self) -> Path:
        """What the attention shows."""
        return self.path / "grounding.json"

    @property
    def grounding_samples(self) -> Path:
        """The same of each sample, one per line."""
        return self.path / "grounding.jsonl"

    @property
    def grounding_heads(self) -> Path:
        """The same of each block and head, one per line."""
        return self.path / "grounding_heads.csv"

    @property
    def separability(self) -> Path:
        """How well the visual tokens of regions separate, by block."""
        return self.path / "separability.json"

    @property
    def separability_picture(self) -> Path:
        """The visual tokens in two dimensions."""
        return self.path / "separability.png"


@dataclass(frozen=True)
class CheckpointFolder:
    """RUN/checkpoints/step-N: one checkpoint."""

    path: Path

    STATE = "state"  # DeepSpeed calls it the tag

    @property
    def step(self) -> int:
        """Number of steps that the run had taken."""
        return int(self.path.name.partition("-")[2])

    @property
    def export(self) -> Path:
        """Folder of the trained student."""
        return self.path / "export"

    @property
    def progress(self) -> Path:
        """Steps, samples and counters of the run at this checkpoint."""
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
        """The file with the name of the newest complete checkpoint."""
        return self.path / "latest"

    @property
    def best(self) -> Path:
        """The file with the name of the checkpoint that has the lowest loss on held-out shards."""
        return self.path / "best"

    def read_latest(self) -> CheckpointFolder | None:
        """Return the checkpoint that `latest` refers to, even if it does not exist; None where no file names one."""
        name = self.latest.read_text(errors="replace").strip() if self.latest.is_file() else ""
        return CheckpointFolder(self.path / name) if _STEP.fullmatch(name) else None

    def step(self, step: int) -> CheckpointFolder:
        """Return the folder of the checkpoint after `step` steps."""
        return CheckpointFolder(self.path / f"step-{step:06d}")

    def by_step(self) -> dict[int, CheckpointFolder]:
        """Return the checkpoints on disk by step, in ascending order."""
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
    def environment(self) -> Path:
        """Batch job, number of ranks, GPU and versions of the last start."""
        return self.path / "environment.json"

    @property
    def metrics(self) -> Path:
        """One row of numbers per logged step."""
        return self.path / "metrics.jsonl"

    @property
    def lock(self) -> Path:
        """Locked while a training process uses the folder."""
        return self.path / "lock"

    def log(self, rank: int) -> Path:
        """Return the file with the messages of a rank."""
        return self.path / "logs" / f"rank-{rank}.log"

    def exit_record(self, rank: int) -> Path:
        """Return the file with the exit status of a rank."""
        return self.path / "logs" / f"rank-{rank}.exit.json"

    def exit_records(self) -> list[Path]:
        """Return the files of all ranks of the last start that have one."""
        return list(self.path.glob("logs/rank-*.exit.json"))

    @property
    def attempts(self) -> Path:
        """One row per start by `medalign supervise`."""
        return self.path / "attempts.jsonl"

    @property
    def stacks(self) -> Path:
        """Return the folder of the ranks' stacks when the run hung."""
        return self.path / "stacks"

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
        """Return the folder of the evaluation `name`."""
        return EvaluationFolder(self.evaluation_root / name)

    def evaluations(self, prefix: str = "") -> list[EvaluationFolder]:
        """Return the evaluations that have scores and a name with this prefix, sorted by name."""
        found = [EvaluationFolder(folder) for folder in sorted(self.evaluation_root.glob(f"{prefix}*"))]
        return [evaluation for evaluation in found if evaluation.scores.is_file()]


def find_run(path: Path) -> tuple[RunFolder, str]:
    """Return the run folder that keeps the evaluations of `path`, and the prefix of their names.

    The evaluations of a checkpoint are kept in its run's folder, because the checkpoint is deleted once newer ones
    replace it. Their names begin with its step. For every other path the prefix is empty.

    Args:
        path: folder of a run, a checkpoint or an export.
    """
    resolved = path.resolve()
    for folder in (resolved, resolved.parent):  # a checkpoint, or the export in it
        if folder.parent.name == _CHECKPOINTS and folder.name.startswith("step-"):
            return RunFolder(folder.parents[1]), f"{folder.name}-"
    return RunFolder(path), ""
