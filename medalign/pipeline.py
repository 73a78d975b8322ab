"""Settings to batches: the one place that builds index, order, collator and loader, for all commands."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np

from medalign import distributed
from medalign.config import Config
from medalign.data.batches.collator import Collator, TeacherView
from medalign.data.batches.loader import TrainLoader, ValidationLoader
from medalign.data.batches.prompts import PromptEncoder
from medalign.data.order.mixture import LengthGroupedOrder, Mixture
from medalign.data.order.order import GlobalOrder, Order
from medalign.data.shards.index import ShardIndex
from medalign.data.shards.table import image_share
from medalign.data.storage.byte_ranges import StorageOptions
from medalign.errors import ConfigError
from medalign.student.checks import check_student, warn_about_positions
from medalign.student.families.base import ModelSpec

log = logging.getLogger("medalign")


def open_index(config: Config, folders: Sequence[str] | None = None) -> ShardIndex:
    """Open the index of folders of shards; by default, of the training folders."""
    data = config.data
    return ShardIndex.open(data.folders if folders is None else folders, StorageOptions.from_settings(data))


def open_indexes(config: Config) -> tuple[ShardIndex | None, ShardIndex | None]:
    """Open the indexes of the training folders and of the held-out folders; None for what the run does not read."""
    if config.train.steps == 0:
        return None, None
    held_out = open_index(config, config.data.validation_folders) if config.train.evaluate_every else None
    return open_index(config), held_out


def require_images(config: Config, index: ShardIndex) -> None:
    """Log how many samples of each training folder have an image.

    Raises:
        ConfigError: no sample has an image, but the run distils from images.
    """
    folders = range(len(config.data.folders))
    bare = [index.without_image(folder) for folder in folders]
    counts = [int(index.shard_sizes(folder).sum()) for folder in folders]
    for folder, samples, without in zip(config.data.folders, counts, bare, strict=True):
        log.info("%s: %d samples, %s", folder, samples, image_share(samples, without))
    if sum(bare) < sum(counts):
        return
    if config.distils:
        raise ConfigError(
            f"no sample of data.train {', '.join(config.data.folders)} has an image, but losses.alpha "
            f"{config.losses.alpha} and losses.beta {config.losses.beta} distil from images; name folders with images, "
            "see what `medalign shards index` reports for these, or set both to 0 to train on text"
        )
    log.warning("no sample of data.train has an image: the student is trained on text only")


def build_order(config: Config, index: ShardIndex) -> Order:
    """Build the order of all samples. It depends only on the settings, so it is the same on every rank."""
    data, seed = config.data, config.run.seed
    sizes = [index.shard_sizes(folder) for folder in range(len(data.folders))]
    order: Order
    if data.weights:
        streams = [
            GlobalOrder(int(shards.sum()), seed, shards=shards, block=data.shuffle_block, stream=folder)
            for folder, shards in enumerate(sizes)
        ]
        order = Mixture(streams, data.weights, seed)
    else:
        order = GlobalOrder(len(index), seed, shards=np.concatenate(sizes), block=data.shuffle_block)
    if data.length_groups > 1:
        batch, groups = config.train.batch_size, data.length_groups
        order = LengthGroupedOrder(order, index.lengths, global_batch=batch, groups=groups, seed=seed)
    return order


def build_collator(
    config: Config,
    spec: ModelSpec,
    processor: Any,
    teacher_view: TeacherView | None,
    max_images: int,
    also: Sequence[TeacherView] = (),
) -> Collator:
    """Build the collator for training. Only the shapes of the models are needed.

    Args:
        config: the whole configuration.
        spec: the student's spec.
        processor: the student's processor.
        teacher_view: how the teacher preprocesses images, or another view for it; None without a teacher.
        max_images: largest number of images in a sample.
        also: the views of further teachers.

    Raises:
        ConfigError: the settings do not fit the student.
    """
    if config.data.packing and spec.family.no_packing:
        raise ConfigError(f"data.packing is true, but {spec.family.no_packing}; set data.packing to false")
    encoder = _encoder(spec, processor, config.data.max_length, max_images, "data.max_length")
    view, rows = spec.preprocess_cfg(processor), config.losses.attention_rows
    return Collator(encoder, view, teacher_view, also=also, packed=config.data.packing, attention_rows=rows)


def build_question_collator(spec: ModelSpec, processor: Any, max_length: int, max_images: int) -> Collator:
    """Build the collator for evaluation: questions without answers, padded on the left.

    Args:
        spec: the student's spec.
        processor: the student's processor.
        max_length: limit of a question and one image, in tokens. Each further image adds its tokens to the limit.
        max_images: largest number of images in a sample.
    """
    longest = max_length + (max_images - 1) * spec.image.count
    encoder = _encoder(spec, processor, longest, max_images, "--max-length")
    return Collator(encoder, spec.preprocess_cfg(processor), None, padding_side="left", with_answer=False)


def _encoder(spec: ModelSpec, processor: Any, max_length: int, max_images: int, setting: str) -> PromptEncoder:
    limit = spec.family.max_images
    if limit is not None and max_images > limit:
        raise ConfigError(
            f"the largest sample has {max_images} images, but a student of the family {spec.family.model_type} takes "
            f"{limit} per sample; pack samples with fewer images"
        )
    warn_about_positions(spec, max_length, setting)
    return PromptEncoder(
        processor,
        image=spec.image,
        max_length=max_length,
        max_images=max_images,
        setting=setting,
    )


def check_collator(
    config: Config, teacher_view: TeacherView | None, max_images: int, also: Sequence[TeacherView] = ()
) -> tuple[Collator, Any]:
    """Build the collator for training, and the student's processor, without reading the student's weights.

    Raises:
        ConfigError: within seconds, for everything that can be known without the weights and prevents training.
    """
    spec, processor = check_student(config.student)
    return build_collator(config, spec, processor, teacher_view, max_images, also), processor


def build_loader(
    config: Config, index: ShardIndex, collator: Collator, start_step: int, *, whole_batch: bool = False
) -> TrainLoader:
    """Build the loader of this rank, from `start_step` on.

    Args:
        config: the whole configuration.
        index: the training folders.
        collator: samples to batches.
        start_step: steps that are already done.
        whole_batch: yield the micro-batches of all ranks, in this process.
    """
    return TrainLoader(
        index,
        build_order(config, index),
        collator,
        global_batch=config.train.batch_size,
        micro_batch=config.train.micro_batch_size,
        rank=0 if whole_batch else distributed.rank(),
        world=1 if whole_batch else distributed.world_size(),
        start_step=start_step,
        workers=0 if whole_batch else config.data.workers,
    )


def build_validation_loader(config: Config, held_out: ShardIndex, collator: Collator) -> ValidationLoader:
    """Build the loader of this rank's share of the held-out samples."""
    return ValidationLoader(
        held_out,
        collator,
        micro_batch=config.train.micro_batch_size,
        rank=distributed.rank(),
        world=distributed.world_size(),
        workers=config.data.workers,
    )
