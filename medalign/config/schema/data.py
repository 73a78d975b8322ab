"""The samples."""

from __future__ import annotations

from dataclasses import dataclass, field

from medalign.config.value_types import ClosedUnitInterval, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt


@dataclass
class DataConfig:
    """The samples and how they are read."""

    train: list[str] | str = field(default_factory=list)
    """Folder of shards to train on, or a list of folders."""
    validation: list[str] | str = field(default_factory=list)
    """Folder of held-out shards, or a list of folders, for train.evaluate_every."""
    workers: NonNegativeInt = 0
    """Loader processes per rank; 0 reads in the training process. The batches are the same for any number."""
    max_length: PositiveInt = 1024
    """Maximum number of tokens of a sample. It must hold all images of the largest sample: text beyond it is cut off,
    images are never cut."""
    packing: bool = False
    """Concatenate the samples of a micro-batch in one row instead of padding them. Tokens attend only to their own
    sample."""
    max_skip_fraction: ClosedUnitInterval = 0.01
    """The run stops if more than this share of the samples so far cannot be read. Until 100 samples have been read, the
    share is that of 100 samples."""
    weights: list[PositiveFloat] = field(default_factory=list)
    """One weight per folder: how often its samples are drawn. Empty: all folders form one data set, and each sample is
    drawn once per epoch."""
    shuffle_block: PositiveInt = 65536
    """Number of samples that are shuffled together. A larger data set is read block by block; each block consists of
    whole shards, drawn at random."""
    length_groups: NonNegativeInt = 0
    """Number of consecutive global batches whose samples are sorted by length and divided into batches again, to reduce
    padding. 0 and 1 disable it."""
    retries: NonNegativeInt = 5
    """How often a failed read from a shard is tried again, with growing pauses."""
    cache_dir: str = ""
    """Folder for copies of remote shards, shared by the processes of a node. Empty: ~/.cache/medalign, for indexes
    only."""
    cache_gib: NonNegativeFloat = 0.0
    """Maximum size of cache_dir in GiB; 0 caches no samples."""

    @property
    def folders(self) -> list[str]:
        """The training folders as a list."""
        return [self.train] if isinstance(self.train, str) else self.train

    @property
    def validation_folders(self) -> list[str]:
        """The folders of held-out shards as a list."""
        return [self.validation] if isinstance(self.validation, str) else self.validation
