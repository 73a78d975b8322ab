"""Every setting of a run: dataclasses, read from a recipe (YAML) and dotted overrides.

A recipe is a complete run by name. `medalign train phantom --train.steps 50` reads the packaged recipe `phantom`, then
overrides one key. An unknown or ill-typed key is an error that names it and the nearest key.
"""

from __future__ import annotations

import difflib
import math
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml
from jsonargparse import ArgumentError, ArgumentParser, Namespace, set_parsing_settings

from medalign.errors import ConfigError


@dataclass
class RunConfig:
    """The run as a whole."""

    dir: str = "runs/default"
    """Folder of the run: configuration, metrics, checkpoints, export. The same folder again means: go on."""
    seed: int = 0
    """Fixes the data order, the start of LoRA and every dropout mask. From 0 to 2^32 - 1."""


@dataclass
class DataConfig:
    """Where the samples come from and how they are read."""

    train: list[str] | str = field(default_factory=list)
    """Folder of shards to train on, or a list of folders."""
    workers: int = 0
    """Loader processes for each rank; 0 reads in the trainer itself. The batches are the same for any number."""
    max_length: int = 1024
    """Longest sample in tokens; it must hold all images of the largest one. Text beyond it is cut, images never."""
    packing: bool = False
    """Lay a micro-batch's samples end to end in one row instead of padding them; each still sees itself alone."""
    max_bad_share: float = 0.01
    """The run stops when more than this share of the samples cannot be read; fewer than 100 count as 100."""
    weights: list[float] = field(default_factory=list)
    """One weight a folder: how often its samples come. Empty: all folders are one data set, each sample once an epoch.
    """
    shuffle_block: int = 65536
    """Samples shuffled together. A larger data set is read block by block: some whole shards, drawn at random."""
    length_groups: int = 0
    """Global batches among which samples are sorted by length and cut again, for less padding; 0 or 1 does not."""
    retries: int = 5
    """Tries, after the first, to read from a shard that cannot be read, with growing pauses."""
    cache_dir: str = ""
    """Folder for what is read from remote shards, shared by a node. Empty: ~/.cache/medalign, for indexes alone."""
    cache_gib: float = 0.0
    """Most GiB in cache_dir; 0 keeps nothing."""

    @property
    def folders(self) -> list[str]:
        """The training folders, one or many."""
        return [self.train] if isinstance(self.train, str) else self.train


@dataclass
class TeacherConfig:
    """The frozen medical CLIP."""

    path: str = ""
    """Folder with open_clip_config.json and open_clip_model.safetensors, or open_clip:ARCHITECTURE/FILE."""
    random_weights_seed: int | None = None
    """A control: forget the trained weights and draw random ones from this seed."""
    features: Literal["after_norm", "before_norm"] = "after_norm"
    """Patch features of the last block: after the tower's final norm, or before it, as the released code takes them."""


@dataclass
class LoraConfig:
    """Low-rank adapters on every linear layer of the student's language model."""

    rank: int = 32
    """Rank r."""
    alpha: int = 16
    """The adapter's output is multiplied by alpha / r."""
    dropout: float = 0.0
    """Dropout before the adapter."""


@dataclass
class StudentConfig:
    """The vision-language model that learns."""

    path: str = ""
    """Local folder of a LLaVA-class model with tokenizer and processor."""
    layer: int = 20
    """The tapped decoder block l, counted from 0: its input is matched in space, its attention distilled."""
    steering: bool = True
    """Attach the learnable matrix W to the image tokens that enter block l."""
    epsilon: float = 1.0
    """Strength of the steering: X + epsilon X W^T."""
    query_mixture: bool = False
    """Attach the query-adaptive mixture of LoRA experts to the query projection of block l."""
    query_mixture_form: Literal["beside_lora", "official"] = "beside_lora"
    """beside_lora: the projection keeps its LoRA. official, as in the released code: it has none, and the experts have
    LoRA's start and dropout. The router reads the last question token in both: the released one reads the token after
    the last ":", which is the answer's first in training and does not exist yet in generation."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """The adapters."""
    train_projector: bool = False
    """Train the projector between vision tower and language model too."""
    attention: Literal["auto", "sdpa", "flash_attention_2", "eager"] = "auto"
    """Attention of every block. auto: flash_attention_2 where flash-attn and a GPU are there, else sdpa."""
    gradient_checkpointing: bool = False
    """Recompute blocks in the backward pass, all but the tapped one, to save memory."""


@dataclass
class LossConfig:
    """L = L_LM + alpha L_vis + beta L_att."""

    alpha: float = 1.0
    """Coefficient of the spatial alignment loss; 0 leaves it out."""
    beta: float = 0.06
    """Coefficient of the attention loss; 0 leaves it out."""
    normalise: Literal["sum", "softmax", "official"] = "sum"
    """How attention becomes a distribution: divided by its sum; softmax of its values; by its L2 norm, as the released
    code does (official; the loss may then be negative)."""
    language_mean: Literal["tokens", "samples"] = "tokens"
    """The language loss is the mean over the answer tokens of the global batch, or (samples, as in the released code)
    the mean over each sample's answer tokens, then over the samples of the global batch."""
    attention_rows: Literal["prompt", "official"] = "prompt"
    """Tokens after the image whose attention is distilled: all of the prompt, or (official, as in the released code) up
    to the last ":" of prompt and answer together."""
    weighting: Literal["uniform", "teacher_attention"] = "uniform"
    """Weights of the token pairs in the spatial loss: all alike, or by the teacher's attention to both."""
    ignore_padding: bool = False
    """Leave patches that show only canvas padding out of both distillation losses."""
    impl: Literal["auto", "reference", "chunked", "triton"] = "auto"
    """Implementation of the kernels. auto: triton on a GPU if it can run, else chunked. A name is taken or refused."""


@dataclass
class TrainConfig:
    """The optimisation."""

    steps: int | None = 1000
    """Optimizer steps of the whole run; 0 writes the untrained student as a run. null where train.epochs decides."""
    epochs: float | None = None
    """Passes over the training samples, in place of train.steps: epochs * samples / batch_size steps, rounded to the
    nearest whole number (halves up), at least 1. Whichever of the two the command line sets replaces the recipe's."""
    batch_size: int = 32
    """Samples in a step, over all ranks and accumulated micro-batches."""
    micro_batch_size: int = 4
    """Samples in one forward pass of one rank."""
    lr: float = 2e-4
    """Peak learning rate of the adapters, W and the mixture."""
    projector_lr: float = 2e-5
    """Peak learning rate of the projector."""
    weight_decay: float = 0.0
    """Weight decay of the adapters and the projector; W never decays."""
    warmup: float = 0.03
    """Share of the steps over which the learning rate rises; then it falls as a cosine to 0."""
    clip: float = 1.0
    """Largest norm of the gradient; 0 does not clip."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """auto: bf16 on a GPU, fp32 on a CPU."""


@dataclass
class CheckpointConfig:
    """What is kept on disk."""

    every: int = 500
    """Steps between two checkpoints; the last step always writes one."""
    keep: int = 2
    """Newest checkpoints to keep."""


@dataclass
class EngineConfig:
    """How the state is spread over the ranks."""

    deepspeed: str = "zero3"
    """Name of a DeepSpeed configuration in ds_configs/, or a path to one."""


@dataclass
class LogConfig:
    """What is written down while the run goes on: numbers, and settings without paths; no image or text of the data."""

    every: int = 10
    """Steps between two rows of metrics."""
    wandb: Literal["off", "offline", "online"] = "offline"
    """Weights & Biases: off, kept in the run's folder, or sent."""
    project: str = "medalign"
    """W&B project."""
    entity: str | None = None
    """W&B team."""
    name: str | None = None
    """Name of the run in W&B. By default its random id: a folder's name may tell of patients."""


@dataclass
class Config:
    """A whole run."""

    run: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    student: StudentConfig = field(default_factory=StudentConfig)
    losses: LossConfig = field(default_factory=LossConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    log: LogConfig = field(default_factory=LogConfig)

    @property
    def distils(self) -> bool:
        """Whether the teacher is needed at all."""
        return self.losses.alpha > 0 or self.losses.beta > 0


def recipes() -> list[str]:
    """Names of the packaged recipes."""
    return sorted(p.name.removesuffix(".yaml") for p in _recipe_folder().iterdir() if p.name.endswith(".yaml"))


def load(recipe: str, overrides: Sequence[str] = (), *, models: bool = True) -> Config:
    """The configuration of a packaged recipe or a YAML file, after dotted overrides (`--train.steps 50`).

    `models=False` does without the models' paths, for what concerns the data alone.

    `${assets}` in a value is the folder of the packaged models. Raises ConfigError for an unknown recipe, an
    unknown key, an ill-typed value, or settings that contradict each other.
    """
    parser = _parser()
    text = _read_recipe(recipe).replace("${assets}", str(resources.files("medalign") / "assets"))
    try:
        values = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise ConfigError(f"recipe {recipe} is not YAML: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"recipe {recipe} must hold sections such as 'train:', found {type(values).__name__}")
    known, given = set(_keys(Config)), set(_flat(values))
    for key in given:
        _require_known(key, known, f"recipe {recipe}")
    named = {word[2:].split("=")[0].rstrip("+") for word in overrides if word.startswith("--")}
    for key in named:
        _require_known(key, known, "the command line")
    try:
        namespace = _one_length(parser.parse_object(values, defaults=True), given)
    except (ArgumentError, TypeError, ValueError) as error:
        raise ConfigError(f"recipe {recipe}: {_plain_fault(str(error))}") from None
    try:
        namespace = _one_length(parser.parse_args([*overrides], namespace=namespace), named)
        config = _instantiate(Config, namespace)
    except (ArgumentError, TypeError, ValueError) as error:
        raise ConfigError(f"the command line: {_plain_fault(str(error))}") from None
    validate(config, models=models)
    return config


def _one_length(namespace: Namespace, given: set[str]) -> Namespace:
    """Unset whichever of train.steps and train.epochs was not given where the other one was."""
    for key, other in (("train.steps", "train.epochs"), ("train.epochs", "train.steps")):
        if key in given and namespace[key] is not None and other not in given:
            namespace[other] = None
    return namespace


def describe_settings() -> str:
    """Every setting with its type, default and meaning, as `medalign train --help` shows it."""
    text = _parser().format_help().split("\n\n", 1)[-1]
    # jsonargparse offers a file for each section too; a recipe is the one file here.
    return re.sub(r"  --[\w.]+ CONFIG\s+Path to a configuration file.\n", "", text)


def _parser() -> ArgumentParser:
    set_parsing_settings(docstring_parse_attribute_docstrings=True)  # the lines under the fields become the help
    parser = ArgumentParser(exit_on_error=False, default_env=False, add_help=False)
    for section in fields(Config):
        parser.add_class_arguments(get_type_hints(Config)[section.name], section.name)
    return parser


def validate(config: Config, *, models: bool = True) -> None:
    """Raises ConfigError where settings are missing or contradict each other."""

    def require(holds: bool, message: str) -> None:
        if not holds:
            raise ConfigError(message)

    train = config.train
    require(
        not models or bool(config.student.path),
        "student.path is not set: name a local model folder with --student.path DIR",
    )
    require(
        not models or not config.distils or bool(config.teacher.path),
        "teacher.path is not set; set it, or set losses.alpha 0 and losses.beta 0",
    )
    _require_one_length(config)
    require(
        train.steps == 0 or bool(config.data.folders), "data.train is not set: name shard folders with --data.train DIR"
    )
    # Beyond this, the seeds of single steps (`distributed.seed_step`) would be no 64-bit numbers.
    require(0 <= config.run.seed < 2**32, f"run.seed is {config.run.seed}; it must be from 0 to {2**32 - 1}")
    require(0 <= train.warmup <= 1, f"train.warmup is {train.warmup}; it is a share of the steps, from 0 to 1")
    require(train.clip >= 0, f"train.clip is {train.clip}; it must not be negative (0 does not clip)")
    for key in ("train.batch_size", "train.micro_batch_size", "checkpoint.every", "checkpoint.keep", "log.every"):
        section, name = key.split(".")
        value = getattr(getattr(config, section), name)
        require(value >= 1, f"{key} is {value}; it must be at least 1")
    data = config.data
    require(
        not data.weights or len(data.weights) == len(data.folders),
        f"data.weights holds {len(data.weights)} numbers for {len(data.folders)} folders; give one each",
    )
    require(all(w > 0 for w in data.weights), f"data.weights is {data.weights}; each must be above 0")
    require(data.shuffle_block >= 1, f"data.shuffle_block is {data.shuffle_block}; it must be at least 1")
    for key in ("length_groups", "retries", "cache_gib", "workers"):
        value = getattr(data, key)
        require(value >= 0, f"data.{key} is {value}; it must not be negative")
    require(not data.cache_gib or bool(data.cache_dir), "data.cache_gib is set; name its folder with --data.cache_dir")
    require(data.max_length >= 1, f"data.max_length is {data.max_length}; it must be at least 1")
    require(0 <= data.max_bad_share <= 1, f"data.max_bad_share is {data.max_bad_share}; it is a share from 0 to 1")
    for key in ("lr", "projector_lr"):
        value = getattr(train, key)
        require(value is None or value >= 0, f"train.{key} is {value}; it must not be negative")
    lora = config.student.lora
    require(lora.rank >= 1, f"student.lora.rank is {lora.rank}; it must be at least 1")
    require(0 <= lora.dropout < 1, f"student.lora.dropout is {lora.dropout}; it is a share from 0 to below 1")
    for key in ("alpha", "beta"):
        value = getattr(config.losses, key)
        require(value >= 0, f"losses.{key} is {value}; it must not be negative")
    require(
        config.student.layer >= 1,
        f"student.layer is {config.student.layer}; the tapped block needs one before it, so at least 1",
    )


def _require_one_length(config: Config) -> None:
    """Raise ConfigError unless exactly one of train.steps and train.epochs says how long the run is."""
    steps, epochs = config.train.steps, config.train.epochs
    if steps is not None and epochs is not None:
        raise ConfigError(f"train.steps is {steps} and train.epochs is {epochs}; set one of them")
    if steps is None and epochs is None:
        raise ConfigError("neither train.steps nor train.epochs is set; set one of them")
    if steps is not None and steps < 0:
        raise ConfigError(f"train.steps is {steps}; it must not be negative")
    if epochs is not None and not 0 < epochs < math.inf:
        raise ConfigError(
            f"train.epochs is {epochs}; it must be a number above 0 (train.steps 0 writes the untrained student)"
        )
    if epochs is not None and config.data.weights:
        raise ConfigError(
            f"train.epochs is {epochs} and data.weights is {config.data.weights}: folders mixed by weight have no "
            "common epoch; set train.steps"
        )


def dump(config: Config) -> str:
    """The configuration as YAML, complete, readable by `load`.

    Where train.epochs decides, train.steps stays null, and a comment tells the steps if they are known by now.
    """
    values, train = _plain(config), config.train
    comment = ""
    if train.epochs is not None:
        values["train"]["steps"] = None
        comment = f"# {train.epochs} epochs are {train.steps} steps\n" if train.steps is not None else ""
    return comment + yaml.safe_dump(values, sort_keys=False)


def read(path: Path) -> Config:
    """The configuration that a run wrote into its folder."""
    if not path.is_file():
        raise ConfigError(f"{path} does not exist: {path.parent} is not the folder of a run")
    return load(str(path))


def _recipe_folder() -> resources.abc.Traversable:
    return resources.files("medalign") / "recipes"


def _read_recipe(recipe: str) -> str:
    packaged = _recipe_folder() / f"{recipe}.yaml"
    if re.fullmatch(r"[\w-]+", recipe) and packaged.is_file():
        return packaged.read_text()
    if os.path.isfile(recipe):
        try:
            return Path(recipe).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ConfigError(f"recipe {recipe} is not text (UTF-8); name a YAML file") from error
    near = difflib.get_close_matches(recipe, recipes(), n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise ConfigError(
        f"unknown recipe {recipe!r}: {hint}Packaged are {', '.join(recipes())}; a path to a YAML file works too"
    )


def _require_known(key: str, known: set[str], where: str) -> None:
    if key in known:
        return
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    same_name = [k for k in sorted(known) if k.split(".")[-1] == key.split(".")[-1]]
    nearest = [*same_name, *near]
    hint = f"the nearest known key is {nearest[0]!r}" if nearest else "medalign train --help lists the known ones"
    raise ConfigError(f"unknown key {key!r} in {where}; {hint}")


def _keys(kind: type, prefix: str = "") -> Iterator[str]:
    hints = get_type_hints(kind)
    for item in fields(kind):
        if is_dataclass(hints[item.name]):
            yield from _keys(hints[item.name], f"{prefix}{item.name}.")
        else:
            yield prefix + item.name


def _flat(values: dict, prefix: str = "") -> Iterator[str]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        return {item.name: _plain(getattr(value, item.name)) for item in fields(value)}
    return value


def _instantiate(kind: type, values: Namespace) -> Config:
    hints = get_type_hints(kind)
    arguments = {}
    for item in fields(kind):
        value = values[item.name]
        arguments[item.name] = _instantiate(hints[item.name], value) if is_dataclass(hints[item.name]) else value
    return kind(**arguments)


def _plain_fault(message: str) -> str:
    """jsonargparse's message of a value that does not suit its setting, in plain words."""
    tidy = " ".join(message.split())
    found = re.search(r'key "([\w.]+)".* (?:Given|Got) value: (.*)', tidy)
    if found is None or found[1] not in _keys(Config):
        return tidy
    key, value = found.groups()
    section, _, name = key.partition(".")
    owner = get_type_hints(Config)[section]
    for part in name.split(".")[:-1]:
        owner = get_type_hints(owner)[part]
    return f"{key} is {value}; it must be {_wanted(get_type_hints(owner)[name.split('.')[-1]])}"


def _wanted(kind: Any) -> str:
    """What a setting of a type takes, in words."""
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}
    if kind in words:
        return words[kind]
    if get_origin(kind) is Literal:
        return f"one of {', '.join(map(str, get_args(kind)))}"
    if get_origin(kind) is list:
        return f"a list, each item {_wanted(get_args(kind)[0])}"
    return " or ".join(_wanted(one) for one in get_args(kind))
