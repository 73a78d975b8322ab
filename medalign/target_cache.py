"""The cache of targets: written by `medalign targets`, checked before a run that reads it."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from medalign import distributed, pipeline
from medalign.config import Config
from medalign.config.schema.teacher import TeacherSettings
from medalign.data.batches.collator import Collator
from medalign.data.batches.loader import ValidationLoader
from medalign.data.shards.index import ShardIndex
from medalign.engine.settings import precision
from medalign.errors import ConfigError
from medalign.geometry import PIXELS, PreprocessCfg
from medalign.teacher.cache import identity
from medalign.teacher.cache import teacher as cached
from medalign.teacher.cache.files import DIGESTS, CacheFiles, CacheWriter
from medalign.teacher.loading import load_tower, read_preprocess_cfg, teacher_dtype
from medalign.teacher.model import Teacher

log = logging.getLogger("medalign")

_LOG_SECONDS = 30.0


class _DigestView:
    """The view of a teacher that runs its tower, with the hash of each canvas.

    Args:
        preprocess_cfg: of the teacher.
        size: that of the largest teacher of the training, with a cache or without: the training decodes images for it.
    """

    def __init__(self, preprocess_cfg: PreprocessCfg, size: int) -> None:
        self.size = size
        self._preprocess_cfg = preprocess_cfg

    def inputs(self, canvas: Image.Image, where: str = "") -> Mapping[str, torch.Tensor]:
        digest = torch.frombuffer(bytearray(identity.canvas_digest(canvas)), dtype=torch.uint8)
        return {**self._preprocess_cfg.inputs(canvas), DIGESTS: digest}

    def blank(self) -> Mapping[str, torch.Tensor]:
        return self.inputs(Image.new("L", (1, 1)))


def write(config: Config) -> None:
    """Write the targets of all images of data.train and data.validation into the cache of each teacher that has one.

    Images that are there already are skipped, so that the same command continues after an interruption. Each rank
    takes its part of the samples. Ranks do not wait for each other.

    Args:
        config: the settings of the training.

    Raises:
        ConfigError: nothing is distilled, no teacher has a cache, or a cache holds targets of another teacher.
    """
    distributed.adopt_launcher()
    if not config.distils:
        raise ConfigError(
            "losses.alpha and losses.beta are 0, so no teacher is loaded and there are no targets; set them as in the "
            "training that reads the cache"
        )
    settings = [each for each in config.teachers if each.cache]
    if not settings:
        raise ConfigError("teacher.cache is not set; give the folder of the targets with --teacher.cache DIR")
    folders = (config.data.folders, config.data.validation_folders)
    indexes = [pipeline.open_index(config, each) for each in folders if each]
    size = _largest_size(config)
    views = [_DigestView(read_preprocess_cfg(each.path, each.mean, each.std), size) for each in settings]
    largest = max(index.max_images for index in indexes)
    collator, _ = pipeline.check_collator(config, views[0], largest, also=views[1:])
    images = sum(index.image_count for index in indexes)
    stages = [_prepare(config, each, collator, images) for each in settings]
    for index in indexes:
        _write_index(config, index, collator, stages)
        for _, writer in stages:
            writer.flush()
            for fingerprint in index.fingerprint():
                writer.mark_covered(fingerprint, distributed.world_size())
    for _, writer in stages:
        log.info("%s: %d images added, %d in all", writer.folder, writer.count, len(CacheFiles(writer.folder)))


def check(config: Config, collator: Collator, indexes: Sequence[ShardIndex | None]) -> None:
    """Check that each cache holds the targets of its teacher for these shards. Only rank 0 needs to call it.

    Args:
        config: the settings of the training.
        collator: without views of teachers.
        indexes: the training shards and the held-out ones; None for what the run does not read.

    Raises:
        ConfigError: it does not; the message gives the first difference and the remedy.
    """
    for settings in config.teachers:
        if settings.cache:
            folder = Path(settings.cache)
            identity.require_same(cached.read(folder), _describe(config, settings, collator), folder, extend=False)
            files = CacheFiles(folder)
            for fingerprint in (each for index in indexes if index is not None for each in index.fingerprint()):
                if not files.covers(fingerprint):
                    raise ConfigError(
                        f"teacher.cache {folder} does not hold the targets of all images of the shards with "
                        f"{fingerprint}; add them by medalign targets with the settings of this run"
                    )


def _prepare(config: Config, settings: TeacherSettings, collator: Collator, images: int) -> tuple[Teacher, CacheWriter]:
    """Load a teacher, begin its cache, and log how much of the disk it takes, before the first target is computed."""
    expected, folder = _describe(config, settings, collator), Path(settings.cache)
    teacher = load_tower(settings, distributed.device(), precision(config))
    cached.begin(folder, expected, teacher)
    each, free = cached.bytes_per_image(teacher), shutil.disk_usage(folder).free
    log.info(
        "%s: %.1f kB per image, at most %d images (each is stored once): %.2f GB; %.2f GB are free",
        folder,
        each / 1e3,
        images,
        each * images / 1e9,
        free / 1e9,
    )
    if each * images > free:
        log.warning("the disk of teacher.cache %s may become full: it has %.2f GB", folder, free / 1e9)
    return teacher, CacheWriter(folder, distributed.rank())


def _describe(config: Config, settings: TeacherSettings, collator: Collator) -> dict[str, Any]:
    """Describe what the cache of a teacher must be made with in this run."""
    pixels = max(collator.student_view.size, _largest_size(config))  # as `Collator.pixels` with all teachers
    dtype = teacher_dtype(settings, precision(config))
    return identity.describe(settings, dtype, collator.student_view.mean_color, pixels)


def _largest_size(config: Config) -> int:
    return max(read_preprocess_cfg(each.path, each.mean, each.std).size for each in config.teachers)


@torch.no_grad()
def _write_index(
    config: Config, index: ShardIndex, collator: Collator, stages: Sequence[tuple[Teacher, CacheWriter]]
) -> None:
    """Write the targets of this rank's part of the samples."""
    loader = ValidationLoader(
        index,
        collator,
        micro_batch=config.train.micro_batch_size,
        rank=distributed.rank(),
        world=distributed.world_size(),
        workers=config.data.workers,
        adjacent=True,  # questions about one image are usually neighbors, and its targets are then stored once
    )
    logged = time.monotonic()
    for number, batch in enumerate(loader, start=1):
        for reason in batch.skipped:
            log.warning("bad sample skipped: %s", reason)
        for inputs, (teacher, writer) in zip(batch.teachers, stages, strict=True):
            _add(inputs, batch.image_weight, teacher, writer)
        if time.monotonic() - logged > _LOG_SECONDS:
            log.info("batch %d of %d: %d images added", number, len(loader), stages[0][1].count)
            logged = time.monotonic()


def _add(inputs: Mapping[str, torch.Tensor], weight: torch.Tensor, teacher: Teacher, writer: CacheWriter) -> None:
    """Add the targets of the images of a batch that are not in the cache."""
    new: dict[bytes, int] = {}
    for place, digest in enumerate(inputs[DIGESTS].numpy()):
        if weight[place] > 0 and (key := digest.tobytes()) not in writer:
            new.setdefault(key, place)
    if new:
        pixels = inputs[PIXELS][list(new.values())].to(distributed.device())
        writer.add(list(new), teacher.observe({PIXELS: pixels}))
