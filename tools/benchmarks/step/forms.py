"""The forms of a training step that the benchmark compares, all run by one student and one engine.

    plain             language loss only: no teacher, no tap, no W
    medalign_given    both distillation losses, with precomputed targets of the teacher
    medalign_online   both losses, with the teacher running online
    released_given    the form of the released code: eager attention that keeps the weights of every block, N x N
                      similarity matrices in autograd, the teacher's matrix precomputed
    released_online   the same, with the teacher running online

Precomputed targets are in host memory and are copied to the device in each step. Learning rates are 0: the weights stay
the same in all rounds, while the optimizer does all of its work.

B samples, L tokens, I images, N image tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from medalign.config import Config, LossConfig
from medalign.contracts import IGNORE, Batch, LossReport, LossValue, StudentOutput, TeacherTargets
from medalign.engine.engine import Engine
from medalign.geometry import gather_images
from medalign.kernels.token_similarity.reference import cosines
from medalign.losses import Objective, SimilarityTerm, build_terms
from medalign.student.backends import attention_names
from medalign.student.model import Student
from medalign.student.packing import forward_arguments
from medalign.teacher.model import Teacher
from medalign.teacher.targets import teacher_targets
from medalign.training.step import TrainStep


class Form(NamedTuple):
    """One way to take a step."""

    name: str
    distils: bool
    released: bool = False
    given: bool = False  # whether the teacher's targets are precomputed


FORMS = (
    Form("plain", distils=False),
    Form("medalign_given", distils=True, given=True),
    Form("medalign_online", distils=True),
    Form("released_given", distils=True, released=True, given=True),
    Form("released_online", distils=True, released=True),
)


class ReleasedStudent(Student):
    """A student that computes and keeps the attention weights of every block, and takes the map from one of them."""

    def forward(self, batch: Batch, *, tap: bool = True) -> StudentOutput:
        """Run the model with the attention weights of every block."""
        kept = (batch.labels[:, 1:] != IGNORE).any(0).nonzero()[:, 0]
        self._begin_batch(batch)
        output = self.model(
            input_ids=batch.input_ids,
            pixel_values=batch.student_pixels.to(self.dtype),
            logits_to_keep=kept,
            output_attentions=True,
            use_cache=False,
            **forward_arguments(batch),
        )
        weights_BLL = output.attentions[self.layer].float().mean(1)
        rows_BL1 = batch.question_mask[..., None].float()
        map_BL = (weights_BLL * rows_BL1).sum(1) / rows_BL1.sum(1).clamp(min=1)
        images, tokens = len(batch.image_weight), self.spec.grid.size
        return StudentOutput(
            logits=output.logits,
            kept=kept,
            tokens=gather_images(self._tokens[self.layer], batch.cells, images, tokens),
            attention=gather_images(map_BL, batch.cells, images, tokens),
        )


class ReleasedSimilarity(SimilarityTerm):
    """The spatial loss from whole matrices [I, N, N], differentiated by autograd.

    The teacher's features may be replaced by its precomputed matrix.
    """

    def compute(self, output: StudentOutput, targets: TeacherTargets | None, batch: Batch) -> LossValue | None:
        """Return the loss, summed over the real images."""
        if output.tokens is None or targets is None:
            return None
        student_INN = cosines(output.tokens.float(), batch.patch_valid)
        count = student_INN.shape[1]
        given = targets.features.shape[1:] == (count, count)
        teacher_INN = targets.features if given else cosines(targets.features, batch.patch_valid)
        loss_I = (student_INN - teacher_INN).square().mean((1, 2))
        weight_I = batch.image_weight.float()
        return LossValue(sum=(loss_I * weight_I).sum(), count=weight_I.sum())


class GivenStep(TrainStep):
    """A step with precomputed targets instead of a teacher."""

    targets: TeacherTargets  # on the host

    def _forward(self, batch: Batch, scale: dict[str, float]) -> LossReport:
        assert self.targets.attention is not None
        given = (self.targets.features, self.targets.attention)
        features, attention = (tensor.to(self.engine.device, non_blocking=True) for tensor in given)
        output = self.engine(batch, tap=True)
        return self.objective(output, TeacherTargets(features, attention), batch, scale)


class Bench:
    """A student in its engine, a teacher, one batch; `take` makes a step of one form and returns its losses.

    `before`: bytes on the GPU before the student was built. The teacher, and earlier students: DeepSpeed's hooks keep
    them as long as the process.
    """

    def __init__(
        self, engine: Engine, student: Student, teacher: Teacher, config: Config, batch: Batch, before: int = 0
    ) -> None:
        self.engine, self.student, self.config, self.batch = engine, student, config, batch
        self.teacher, self.before = teacher, before
        self.teacher_bytes = sum(weight.nbytes for weight in teacher.parameters())
        self.steering = student.steering
        self.rates = {group["name"]: 0.0 for group in engine.optimizer.param_groups}
        self.steps = {form.name: self._step(form) for form in FORMS}

    def take(self, form: Form) -> dict[str, float]:
        """Make one step of a form and return its losses."""
        with self._as(form):
            return self.steps[form.name]([self.batch], self.rates)

    def _step(self, form: Form) -> TrainStep:
        losses = self.config.losses
        alpha, beta = (losses.alpha, losses.beta) if form.distils else (0.0, 0.0)
        language, similarity, attention = build_terms(LossConfig(alpha=alpha, beta=beta, impl=losses.impl))
        if form.released:
            similarity = ReleasedSimilarity(alpha, impl=losses.impl)
        objective = Objective([language, similarity, attention])
        grid = self.student.spec.grid
        if not form.given:
            return TrainStep(self.engine, self.teacher if form.distils else None, objective, grid)
        step = GivenStep(self.engine, None, objective, grid)
        step.targets = self._targets(form)
        return step

    def _targets(self, form: Form) -> TeacherTargets:
        pixels = self.batch.teacher_pixels.to(self.engine.device)
        found = teacher_targets(self.teacher, pixels, self.student.spec.grid)
        valid = torch.ones(found.features.shape[:2], dtype=torch.bool, device=pixels.device)
        features = cosines(found.features, valid) if form.released else found.features
        assert found.attention is not None
        features, attention = features.cpu(), found.attention.cpu()
        if pixels.device.type == "cuda":
            features, attention = features.pin_memory(), attention.pin_memory()
        return TeacherTargets(features, attention)

    @contextmanager
    def _as(self, form: Form) -> Iterator[None]:
        """Put the student into a form: its forward pass, the attention of its blocks, and whether W acts."""
        student: Any = self.student
        names = attention_names("eager" if form.released else self.config.student.attention, student.dtype)
        parts = self._parts()
        before = {part: config._attn_implementation for part, config in parts.items()}
        student.__class__ = ReleasedStudent if form.released else Student
        student.steering = self.steering if form.distils else None
        for part, config in parts.items():
            config._attn_implementation = names[part]
        try:
            yield
        finally:
            student.__class__, student.steering = Student, self.steering
            for part, config in parts.items():
                config._attn_implementation = before[part]

    def _parts(self) -> dict[str, Any]:
        """Return the configurations that select the attention of the language model and of the vision tower."""
        model: Any = self.student.model.get_base_model()
        language: Any = self.student.spec.language_model
        return {"text_config": language.config, "vision_config": model.model.vision_tower.config}
