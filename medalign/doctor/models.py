"""The models and the settings: student, chat template, teacher, grids, and the division of the batch."""

from __future__ import annotations

from medalign import assembly, pipeline
from medalign.config import Config
from medalign.data.order.order import StepPlan
from medalign.doctor.finding import Finding
from medalign.engine.settings import deepspeed_settings
from medalign.planning.shapes import teacher_on_meta
from medalign.student.checks import check_student
from medalign.teacher.loading import read_preprocess_cfg


def check_student_folder(config: Config) -> Finding:
    """Check configuration, tokenizer and the names of the weights. Raises ConfigError for what prevents training."""
    spec, _ = check_student(config.student)
    kind, blocks = spec.family.model_type, len(spec.blocks)
    tapped = " and ".join(map(str, config.student.layers))
    return Finding("student", "ok", f"{kind}, {blocks} blocks of width {spec.width}, block {tapped} tapped")


def check_template(config: Config) -> Finding:
    """Write a question and an answer with the student's chat template, as training does."""
    collator, _ = pipeline.check_collator(config, None, _max_images(config))
    batch = assembly.sanity_batch(collator)
    lengths = batch.attention_mask.sum(1).tolist()
    return Finding("template", "ok", f"two questions have {lengths[0]} and {lengths[1]} tokens with their image")


def _max_images(config: Config) -> int:
    return max((index.max_images for index in pipeline.open_indexes(config) if index is not None), default=1)


def check_teacher(config: Config) -> Finding:
    """Load the teachers with their weights, or open their caches."""
    teachers = assembly.build_teachers(config)
    if not teachers:
        return Finding("teacher", "ok", "not needed, because nothing is distilled")
    shapes = [f"patches {each.grid.rows} x {each.grid.columns} of width {each.width}" for each in teachers]
    return Finding("teacher", "ok", "; ".join(shapes))


def check_grids(config: Config) -> Finding:
    """Compare the grids of student and teacher."""
    tower = teacher_on_meta(config)
    if tower is None:
        return Finding("grids", "ok", "not needed, because nothing is distilled")
    settings = config.teacher
    read_preprocess_cfg(settings.path, settings.mean, settings.std)
    ours, theirs = check_student(config.student)[0].grid, tower.grid
    detail = f"student {ours.rows} x {ours.columns}, teacher {theirs.rows} x {theirs.columns}"
    if ours == theirs:
        return Finding("grids", "ok", f"{detail}: patch by patch")
    if 4 * theirs.size < ours.size:
        return Finding(
            "grids", "warning", f"{detail}: the teacher is much coarser", "choose a teacher of finer patches"
        )
    return Finding("grids", "ok", f"{detail}: the teacher's is resampled")


def check_batch(config: Config, world: int) -> Finding:
    """Check the DeepSpeed configuration, and how the batch is divided over the ranks.

    Args:
        config: the run's settings.
        world: number of ranks.
    """
    deepspeed_settings(config, world)
    plan = StepPlan(config.train.batch_size, config.train.micro_batch_size, world)
    detail = f"{config.train.batch_size} samples per step on {world} ranks, {plan.accumulation} micro-batches each"
    if config.train.batch_size < world:
        idle = world - config.train.batch_size
        return Finding("batch", "warning", f"{detail}: {idle} ranks have none", "raise train.batch_size, or use fewer")
    return Finding("batch", "ok", detail)
