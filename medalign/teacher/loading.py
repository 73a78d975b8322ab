"""Loads a frozen teacher from disk. Nothing is downloaded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from medalign.config.schema import Config, TeacherConfig
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
            `open_clip:ARCH/WEIGHTS` or `biovil:WEIGHTS`, where WEIGHTS is a file (safetensors, or a torch file without
            pickled code). Tags are not supported, because nothing is downloaded.
        device: where the teacher runs.
        dtype: data type of its weights, unless `precision` is among the settings.
        **settings: the other settings of the section `teacher`, by name.

    Raises:
        ConfigError: the source is not valid, or the kind of tower is not supported.
        CheckpointError: the weights cannot be read or do not fit the tower.
    """
    config = TeacherConfig(path=str(path), **settings)
    source = find_teacher(config.path, config.mean, config.std)
    kind = tower_class(source)
    kind.check(source)
    seed = config.random_weights_seed
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed or 0)
        tower = (kind.load if seed is None else kind.build)(source, config.features)
    conditioning = _build_conditioning(source, kind, config) if config.text_weight > 0 else None
    dtype = _DTYPES.get(config.precision, dtype)
    teacher = Teacher(tower.to(dtype), source.mean, source.std, conditioning, config.mask_sinks, config.compile)
    return teacher.to(device)


def read_preprocess_cfg(
    path: str | Path, mean: Sequence[float] | None = None, std: Sequence[float] | None = None
) -> PreprocessCfg:
    """Read how a teacher takes its pixels from its configuration, as in `load_teacher`; its weights are not read."""
    source = find_teacher(path, mean, std)
    mean, std = source.mean, source.std
    size = tower_class(source).check(source)
    return PreprocessCfg(size, (mean[0], mean[1], mean[2]), (std[0], std[1], std[2]))


def require_attention(config: Config) -> None:
    """Check that the teacher has what the losses need, before any weights are read.

    Raises:
        ConfigError: a loss needs attention, and the teacher has none; the message gives the setting.
    """
    source = find_teacher(config.teacher.path, config.teacher.mean, config.teacher.std)
    if tower_class(source).has_attention:
        return
    for needs, setting, remedy in (
        (config.losses.beta > 0, f"losses.beta is {config.losses.beta}", "0"),
        (config.losses.weighting == "teacher_attention", "losses.weighting is teacher_attention", "uniform"),
    ):
        if needs:
            raise ConfigError(
                f"{setting}, but teacher {source.name} has neither a class token nor a pooling head whose attention "
                f"could be distilled; set it to {remedy}, or choose another teacher"
            )


@torch.no_grad()
def _build_conditioning(source: TeacherSource, kind: type[Tower], config: TeacherConfig) -> TextConditioning:
    """Embed the lexicon's prompts. Raises ConfigError if the teacher has no text tower."""
    if not issubclass(kind, TextAlignedTower):
        raise ConfigError(
            f"teacher {source.name} was trained without texts, but teacher.text_weight is {config.text_weight}; set it "
            "to 0, or choose a teacher with a text tower"
        )
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
    )
