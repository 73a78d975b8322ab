"""The metrics that a run logs: their names, units and meaning.

The documentation and the dashboard are made from this list, and a test compares it with the rows of a run.
"""

from __future__ import annotations

import re
from typing import NamedTuple

STEP_METRIC = "train/step"  # in W&B, where every other metric is drawn over it


class Metric(NamedTuple):
    """A metric, or several with a common form.

    Attributes:
        name: a part in braces stands for a name or a number.
        unit: empty for a number without one.
        meaning: what it is, as a phrase.
        when: which rows have it; empty if all rows of training steps do.
    """

    name: str
    unit: str
    meaning: str
    when: str = ""

    @property
    def pattern(self) -> str:
        """The names of this metric, as a regular expression."""
        parts = re.split(r"({\w+})", self.name)
        return "^" + "".join("[^/]+" if part.startswith("{") else re.escape(part) for part in parts) + "$"

    def matches(self, name: str) -> bool:
        """Return whether `name` is this metric."""
        return re.search(self.pattern, name) is not None


_TEACHER = "with a teacher"
_GPU = "on a GPU"

METRICS = (
    Metric("loss/total", "", "sum of the terms, each times its coefficient"),
    Metric("loss/language", "nats per token", "language-model loss (L_LM), a mean over the global batch"),
    Metric("loss/similarity", "", "similarity of visual tokens to the teacher's features (L_vis)", _TEACHER),
    Metric("loss/attention", "nats", "divergence from the teacher's attention (L_att)", _TEACHER),
    Metric("loss/{term}", "", "a term of `losses.extra`, or of a teacher in `teacher.also`", "with such a term"),
    Metric("optim/grad_norm", "", "norm of the whole gradient before clipping"),
    Metric("optim/lr", "", "learning rate of LoRA or of the whole language model, as the optimizer has it"),
    Metric("optim/lr_{group}", "", "learning rate of another parameter group", "for each other group"),
    Metric(
        "optim/steering_norm",
        "",
        "Frobenius norm of W, which is 0 before the first step; with `student.steering_rank`, that of its two factors",
        "if W is trained",
    ),
    Metric("speed/samples_per_second", "1/s", "samples of all ranks"),
    Metric("speed/tokens_per_second", "1/s", "tokens of all ranks, padding left out"),
    Metric("speed/data_wait_share", "", "share of the time in which a rank waits for data"),
    Metric(
        "speed/teacher_share", "", "share of the time in which the teachers run; on a GPU beside the student", _TEACHER
    ),
    Metric("speed/tflops", "1e12/s", "operations of the models per second and rank, without recomputation"),
    Metric("speed/mfu", "", "`speed/tflops` as a share of the GPU's peak", "on an A100, H100, H200 or B200 (SXM)"),
    Metric("memory/cpu_peak_gib", "GiB", "largest memory of rank 0's process"),
    Metric("memory/gpu_peak_gib", "GiB", "largest memory allocated on rank 0's GPU", _GPU),
    Metric("memory/gpu_reserved_gib", "GiB", "largest memory reserved on rank 0's GPU", _GPU),
    Metric("data/skipped", "samples", "bad samples that were replaced, since the first step"),
    Metric("data/truncated", "samples", "samples whose text was cut to `data.max_length`, since the first step"),
    Metric(
        "data/source_{number}_samples",
        "samples",
        "samples taken from a folder, numbered as in `data.train`",
        "with several folders",
    ),
    Metric("train/samples", "samples", "samples taken since the first step"),
    Metric("train/epoch", "", "passes over all samples", "unless folders are mixed by weight"),
    Metric("train/diverged_steps", "steps", "steps whose update was left out"),
    Metric("train/rewinds", "", "how often the run went back to a checkpoint (`train.rewind_on_spike`)"),
    Metric("data/skipped_batches", "batches", "global batches that these rewinds left out"),
    Metric("time/elapsed_seconds", "s", "time in the training loop, without the pauses between starts"),
    Metric("job/world_size", "", "number of ranks"),
    Metric("job/id", "", "number of the batch job", "under SLURM"),
    Metric("validation/loss/{term}", "", "the same loss on held-out samples", "in rows of a validation"),
    Metric("evaluation/{name}/{score}", "", "a score of `medalign evaluate`", "in W&B after `sync --evaluations`"),
)


def find_metric(name: str) -> Metric | None:
    """Return the metric with this name, an exact one first; None if a run logs no such metric."""
    return min((metric for metric in METRICS if metric.matches(name)), key=lambda m: "{" in m.name, default=None)
