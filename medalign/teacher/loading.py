"""Loads a frozen teacher from disk. Nothing is downloaded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from medalign.config.schema import Config, TeacherSettings
from medalign.errors import ConfigError
from medalign.geometry import PreprocessCfg
from medalign.teacher.conditioning import TextConditioning
from medalign.teacher.lexicon import PACKAGED, read_lexicon
from medalign.teacher.model import Teacher
from medalign.teacher.source import TeacherSource, find_teacher
from medalign.teacher.towers import TextAlignedTower, Tower, tower_class

_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}  # teacher.precision "auto" takes the argument


def load_teacher(
    path: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, **settings: Any
) -> Teacher:
    """Load a frozen teacher. Under ZeRO-3, call it before the student is built, on every rank.

    Args:
        path: a local folder with the layout of open_clip's hub models, the folder of a vision model of transformers,
            `open_clip:ARCH/WEIGHTS`, `biovil:FILE` or `pmc_clip:FILE`; files are safetensors, or torch files (without
            pickled code). Tags are not supported, because nothing is downloaded.
        device: where the teacher runs.
        dtype: data type of its weights, unless `precision` is among the settings.
        **settings: the other settings of a teacher, by name.

    Raises:
        ConfigError: the source is not valid, or the kind of tower is not supported.
        CheckpointError: the weights cannot be read or do not fit the tower.
    """
    return load_tower(TeacherSettings(path=str(path), **settings), device, dtype)


def load_tower(settings: TeacherSettings, device: torch.device | str, dtype: torch.dtype) -> Teacher:
    """Load a frozen teacher with these settings, as `load_teacher`. Its cache is not read."""
    source = find_teacher(settings.path, settings.mean, settings.std)
    kind = tower_class(source)
    kind.check(source)
    _require_rollout(source, kind, settings)
    _require_texts(source, kind, settings)
    seed = settings.random_weights_seed
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed or 0)
        tower = (kind.load if seed is None else kind.build)(source, settings.features)
    conditioning = _build_conditioning(source, kind, settings) if settings.text_weight > 0 else None
    tower = tower.to(teacher_dtype(settings, dtype))
    rollout = settings.attention == "rollout"
    teacher = Teacher(tower, source.mean, source.std, conditioning, settings.mask_sinks, settings.compile, rollout)
    if settings.channels_last:
        teacher = teacher.to(memory_format=torch.channels_last)  # of convolutions; other weights have no such order
    return teacher.to(device)


def _require_rollout(source: TeacherSource, kind: type[Tower], settings: TeacherSettings) -> None:
    """Raise ConfigError if attention rollout is asked for and the tower cannot give it."""
    if settings.attention != "rollout":
        return
    if not kind.has_class_token(source):
        raise ConfigError(
            f"teacher.attention is rollout, but teacher {source.name} has no class token, whose attention could be "
            "followed through the blocks; set it to last_block"
        )
    if settings.compile:
        raise ConfigError(
            "teacher.attention is rollout and teacher.compile is true: a compiled tower does not show the attention of "
            "its blocks; set teacher.compile to false"
        )


def _require_texts(source: TeacherSource, kind: type[Tower], settings: TeacherSettings) -> None:
    """Raise ConfigError if text-conditioned attention is asked for and the teacher was trained without texts."""
    if settings.text_weight > 0 and not issubclass(kind, TextAlignedTower):
        raise ConfigError(
            f"teacher {source.name} was trained without texts, but teacher.text_weight is {settings.text_weight}; set "
            "it to 0, or choose a teacher with a text tower"
        )


def teacher_dtype(settings: TeacherSettings, student: torch.dtype) -> torch.dtype:
    """Return the data type of the teacher's weights, given the student's."""
    return _DTYPES.get(settings.precision, student)


def read_preprocess_cfg(
    path: str | Path, mean: Sequence[float] | None = None, std: Sequence[float] | None = None
) -> PreprocessCfg:
    """Read how a teacher takes its pixels from its configuration, as in `load_teacher`; its weights are not read."""
    source = find_teacher(path, mean, std)
    mean, std = source.mean, source.std
    size = tower_class(source).check(source)
    return PreprocessCfg(size, (mean[0], mean[1], mean[2]), (std[0], std[1], std[2]))


def require_attention(config: Config) -> None:
    """Check that each teacher has what its losses need, before any weights are read.

    Raises:
        ConfigError: a loss needs attention, and the teacher has none, or not that of teacher.attention; the message
            gives the setting. Or teacher.text_weight needs texts, and the teacher was trained without.
    """
    for number, settings in enumerate(config.teachers):
        source = find_teacher(settings.path, settings.mean, settings.std)
        kind = tower_class(source)
        kind.check(source)
        _require_rollout(source, kind, settings)
        _require_texts(source, kind, settings)
        if kind.has_attention:
            continue
        beta = config.losses.beta * settings.attention_weight
        reads = config.losses.weighting == "teacher_attention" and config.losses.alpha * settings.similarity_weight > 0
        for needs, setting, remedy in (
            (beta > 0 and number == 0, f"losses.beta is {config.losses.beta}", "0, or teacher.attention_weight to 0"),
            (beta > 0 and number > 0, f"its attention_weight is {settings.attention_weight}", "0"),
            (reads, "losses.weighting is teacher_attention", "uniform"),
        ):
            if needs:
                raise ConfigError(
                    f"{setting}, but teacher {source.name} has neither a class token nor a pooling head whose "
                    f"attention could be distilled; set it to {remedy}, or choose another teacher"
                )


@torch.no_grad()
def _build_conditioning(source: TeacherSource, kind: type[Tower], config: TeacherSettings) -> TextConditioning:
    """Embed the lexicon's prompts."""
    assert issubclass(kind, TextAlignedTower)  # by _require_texts
    lexicon = read_lexicon(config.lexicon or PACKAGED)
    findings = lexicon.findings.values()
    prompts = [list(finding.present) for finding in findings] + [list(finding.absent) for finding in findings]
    embedded = F.normalize(kind.embed_texts(source, [text for texts in prompts for text in texts]), dim=-1)
    means = torch.stack([rows.mean(0) for rows in embedded.split([len(texts) for texts in prompts])])
    present, absent = means.chunk(2)
    return TextConditioning(
        lexicon,
        present,
        absent,
        weight=config.text_weight,
        temperature=config.text_temperature,
        absent_weight=config.text_absent_weight,
        reports=config.text_reports,
    )
