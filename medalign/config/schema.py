"""The settings of a run, as dataclasses.

The text under a field is its documentation: `medalign train --help` and the configuration page are generated from it.
jsonargparse checks each value against the type of its field, including the range of a number.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from medalign.config.ranges import (
    ClosedUnitInterval,
    HalfOpenUnitInterval,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFiniteFloat,
    PositiveFloat,
    PositiveInt,
    Seed,
)

TeacherFeatures = Literal["after_norm", "before_norm"]
AttentionBackend = Literal["auto", "sdpa", "flash_attention_2", "eager"]
QueryMixtureForm = Literal["beside_lora", "official"]
Normalization = Literal["sum", "softmax", "official"]
LanguageMean = Literal["tokens", "samples"]
AttentionRows = Literal["prompt", "official"]
PairWeighting = Literal["uniform", "teacher_attention"]
KernelImpl = Literal["auto", "reference", "chunked", "triton"]
Precision = Literal["auto", "bf16", "fp32"]
LearningRateSchedule = Literal["cosine", "linear", "constant"]
WandbMode = Literal["off", "offline", "online"]


@dataclass
class RunConfig:
    """The run as a whole."""

    dir: str = "runs/default"
    """Folder of the run: configuration, metrics, checkpoints, export. If it contains a run, the run is resumed."""
    seed: Seed = 0
    """Determines the data order, the initial LoRA weights and every dropout mask. From 0 to 2^32 - 1."""


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


@dataclass
class TeacherConfig:
    """The frozen medical CLIP."""

    path: str = ""
    """Folder with open_clip_config.json and its weights, folder of a vision model of transformers,
    open_clip:ARCHITECTURE/FILE, or biovil:FILE."""
    mean: tuple[ClosedUnitInterval, ClosedUnitInterval, ClosedUnitInterval] | None = None
    """Mean of red, green and blue that the teacher was trained with, for pixels from 0 to 1. null: that of its folder;
    open_clip:ARCHITECTURE/FILE has none."""
    std: tuple[ClosedUnitInterval, ClosedUnitInterval, ClosedUnitInterval] | None = None
    """Standard deviation of red, green and blue, as teacher.mean."""
    random_weights_seed: int | None = None
    """A control experiment: replace the trained weights by random ones from this seed."""
    features: TeacherFeatures = "after_norm"
    """Patch features of the last block: after the tower's final norm, or before it, as in the released code."""
    precision: Precision = "auto"
    """Precision of the teacher's weights and activations. auto: that of the student. Targets are always fp32."""
    compile: bool = False
    """Compile the teacher's tower with torch.compile. It costs a minute or so at the start and whenever a micro-batch
    has a new number of images."""
    text_weight: ClosedUnitInterval = 0.0
    """Share of a text-conditioned map in the attention target of each question that names a finding of the lexicon. 0:
    only the class token's attention (the paper's), the same for every question about an image."""
    text_temperature: PositiveFloat = 0.05
    """Temperature of the softmax that turns the patches' relevance for a finding into the text-conditioned map."""
    text_absent_weight: ClosedUnitInterval = 0.0
    """Weight of the prompts where the finding is absent, which are subtracted from those where it is present."""
    mask_sinks: NonNegativeFloat = 0.0
    """Patches whose norm after the last block is larger than this multiple of the image's median get no attention, such
    as 3; 0 is off. Large towers have a few such patches, often of the background, that hold much of the attention."""
    lexicon: str = ""
    """YAML file with the findings that a question can name, and their prompts. Empty: the packaged one, for chest
    radiographs."""


@dataclass
class LoraConfig:
    """Low-rank adapters on linear layers of the student's language model."""

    rank: PositiveInt = 32
    """Rank r."""
    alpha: int = 16
    """The adapter's output is multiplied by alpha / r."""
    dropout: HalfOpenUnitInterval = 0.0
    """Dropout before the adapter."""
    rank_stabilized: bool = False
    """Multiply by alpha / sqrt(r) instead (rsLoRA), so that a larger rank does not make the adapter weaker."""
    targets: str = ""
    """Regular expression of the names inside a block of the layers that get an adapter, such as "self_attn" or
    "(q|v)_proj". Empty: all linear layers."""


@dataclass
class StudentConfig:
    """The vision-language model that is trained."""

    path: str = ""
    """Local folder of a vision-language model, as it is published."""
    image_size: PositiveInt | None = None
    """Pixels per side of the square image, for students that take images of any size. null: as the family says (672
    for Qwen2.5-VL and 768 for Qwen3-VL, which gives 24 x 24 image tokens). Other students have one size."""
    vision_tower: str = ""
    """Folder of the vision tower's config.json and preprocessor_config.json, for a student in the layout of LLaVA's
    authors whose tower is neither in its folder nor known (CLIP ViT-L/14). Weights are read from the student only."""
    layer: PositiveInt = 20
    """The tapped decoder block l, counted from 0: its input is aligned with the teacher's features, its attention with
    the teacher's attention. At least 1, because block l needs one before it."""
    steering: bool = True
    """Attach the learnable matrix W to the image tokens that enter block l."""
    epsilon: float = 1.0
    """Strength of the steering: X + epsilon X W^T."""
    query_mixture: bool = False
    """Attach the query-adaptive mixture of LoRA experts to the query projection of block l."""
    query_mixture_form: QueryMixtureForm = "beside_lora"
    """beside_lora: the projection keeps its LoRA. official, as in the released code: it has none, and the experts have
    LoRA's initial weights and dropout. The router reads the last question token in both: the released one reads the
    token after the last ":", which is the answer's first in training and does not exist yet in generation."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """The adapters."""
    train_projector: bool = False
    """Train the projector between vision tower and language model too."""
    attention: AttentionBackend = "auto"
    """Attention of every block. auto: flash_attention_2 if flash-attn and a GPU are available, else sdpa."""
    gradient_checkpointing: bool = False
    """Recompute blocks in the backward pass to save memory, all except the tapped one."""


@dataclass
class LossConfig:
    """The training loss, L_LM + alpha L_vis + beta L_att."""

    alpha: NonNegativeFloat = 1.0
    """Coefficient of the spatial alignment loss; 0 disables it."""
    beta: NonNegativeFloat = 0.06
    """Coefficient of the attention loss; 0 disables it."""
    normalize: Normalization = "sum"
    """How attention becomes a distribution. sum: divided by its sum. softmax: softmax of its values. official: divided
    by its L2 norm, as in the released code; the loss may then be negative."""
    language_mean: LanguageMean = "tokens"
    """The mean of the language loss. tokens: over the answer tokens of the global batch. samples: over each sample's
    answer tokens, then over the samples of the global batch, as in the released code."""
    attention_rows: AttentionRows = "prompt"
    """Tokens after the image whose attention is distilled. prompt: the rest of the prompt. official: all tokens up to
    the last ":" of prompt and answer, as in the released code."""
    weighting: PairWeighting = "uniform"
    """Weights of the token pairs in the spatial loss. uniform: all equal. teacher_attention: the product of the
    teacher's attention to both tokens."""
    ignore_padding: bool = False
    """Exclude patches that show only canvas padding from both distillation losses."""
    impl: KernelImpl = "auto"
    """Implementation of the kernels. auto: triton on a GPU if it can run, else chunked. Any other implementation that
    cannot run is an error."""
    extra: list[str] = field(default_factory=list)
    """Import paths (package.module.factory) of callables that take the Config and return a further loss term. A term
    that needs the teacher requires teacher.path."""


@dataclass
class TrainConfig:
    """The optimization."""

    steps: NonNegativeInt | None = 1000
    """Optimizer steps of the whole run; 0 writes the untrained student as a run. null if train.epochs is set."""
    epochs: PositiveFiniteFloat | None = None
    """Passes over the training samples, instead of train.steps: epochs * samples / batch_size steps, rounded to the
    nearest whole number (halves up), at least 1. If the command line sets one of the two, the recipe's other one is
    ignored."""
    batch_size: PositiveInt = 32
    """Samples per step, over all ranks and accumulated micro-batches."""
    micro_batch_size: PositiveInt = 4
    """Samples per forward pass of one rank."""
    lr: NonNegativeFloat = 2e-4
    """Peak learning rate of the adapters, W and the mixture."""
    projector_lr: NonNegativeFloat = 2e-5
    """Peak learning rate of the projector."""
    weight_decay: float = 0.0
    """Weight decay of the adapters and the projector. W has none."""
    warmup_ratio: ClosedUnitInterval | None = 0.03
    """Share of the steps over which the learning rate rises linearly to its peak. null if train.warmup_steps is set."""
    warmup_steps: NonNegativeInt | None = None
    """Steps over which the learning rate rises, instead of train.warmup_ratio. If the command line sets one of the two,
    the recipe's other one is ignored."""
    max_grad_norm: NonNegativeFloat = 1.0
    """Gradients are clipped to this norm; 0 disables clipping."""
    max_diverged_steps: NonNegativeInt = 5
    """Steps of the run whose loss or gradient may be NaN or infinite. Such a step updates nothing, on all ranks, and
    its samples are logged; one more than these ends the run."""
    max_loss_ratio: PositiveFloat | None = None
    """A step is treated in the same way if its total loss is more than this many times the median of the last 20 steps.
    null is off."""
    precision: Precision = "auto"
    """auto: bf16 on a GPU, fp32 on a CPU."""
    evaluate_every: NonNegativeInt = 0
    """Steps between two evaluations of the losses on data.validation; 0 disables them. The last step is evaluated too.
    Each new lowest total loss writes a checkpoint, which is kept until there is a lower one; the file checkpoints/best
    contains its name."""


@dataclass
class OptimizerConfig:
    """AdamW, and the schedule of its learning rates after the warm-up. The peaks are settings of train."""

    betas: tuple[HalfOpenUnitInterval, HalfOpenUnitInterval] = (0.9, 0.999)
    """AdamW's decay rates of the first and second moment."""
    eps: PositiveFloat = 1e-8
    """AdamW's term in the denominator."""
    schedule: LearningRateSchedule = "cosine"
    """The learning rate after the warm-up. cosine: falls to the minimum along half a cosine. linear: falls to the
    minimum linearly. constant: stays at the peak."""
    min_lr_ratio: ClosedUnitInterval = 0.0
    """Minimum of each learning rate as a share of its peak. It has no effect on a constant schedule."""


@dataclass
class CheckpointConfig:
    """What is kept on disk."""

    interval: PositiveInt = 500
    """Steps between two checkpoints; the last step always writes one."""
    save_total_limit: PositiveInt = 2
    """Number of checkpoints to keep; older ones are deleted."""
    retry_minutes: NonNegativeFloat = 10.0
    """How long the checkpoint of the last step is tried again if it cannot be written, such as on a full disk. An
    earlier one is tried again when the next one is due, and the run continues."""


@dataclass
class EngineConfig:
    """How the state is distributed over the ranks."""

    deepspeed: str = "zero3"
    """Name of a DeepSpeed configuration in ds_configs/, or a path to one."""
    start_timeout: NonNegativeFloat = 300.0
    """Seconds after which a run is considered to hang: in a part of its start, its first step, a checkpoint or a batch
    of a validation. The stacks of all ranks are then written into the run's folder, and the run ends; 0 is never."""
    step_timeout: NonNegativeFloat = 100.0
    """The same for reading the batch of a step, and for each of its micro-batches."""


@dataclass
class LogConfig:
    """What is logged during the run: numbers, and settings without paths; no image or text of the data."""

    interval: PositiveInt = 10
    """Steps between two rows of metrics."""
    wandb: WandbMode = "offline"
    """Weights & Biases: off, kept in the run's folder, or sent."""
    project: str = "medalign"
    """W&B project."""
    entity: str | None = None
    """W&B team."""
    name: str | None = None
    """Name of the run in W&B. By default its random id, because a folder's name may identify patients."""
    profile_steps: NonNegativeInt = 0
    """Steps that torch.profiler traces into profile/ in the run's folder, after the first three; 0 is off."""


@dataclass
class Config:
    """All settings of a run."""

    run: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    student: StudentConfig = field(default_factory=StudentConfig)
    losses: LossConfig = field(default_factory=LossConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    log: LogConfig = field(default_factory=LogConfig)

    @property
    def distils(self) -> bool:
        """Whether the teacher is loaded."""
        extra = bool(self.losses.extra and self.teacher.path)
        return self.losses.alpha > 0 or self.losses.beta > 0 or extra
