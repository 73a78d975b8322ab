"""The form of a decoding method, and the settings of generation.

Shape suffixes: B samples, T new tokens, I images, N cells per image.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import Field, dataclass, field, fields, replace
from typing import Any, ClassVar, Self, TypeVar

import torch

from medalign.config import StudentConfig
from medalign.contracts import Batch
from medalign.data.batches.collator import Collator
from medalign.decoding.nucleus import NucleusSampler
from medalign.errors import ConfigError
from medalign.student.families.base import ModelSpec
from medalign.student.model import Student
from medalign.student.views import View

Processor = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Takes the tokens so far [B, L] and scores [B, V]; returns new scores [B, V]."""

Value = TypeVar("Value")


@dataclass(frozen=True)
class Prepared:
    """What a method changes in a generation.

    Attributes:
        batch: what the student reads. Its first rows are the samples, in their order; others are further views of them.
        processors: what changes the scores of the next token, in order.
        views: how the prompts are read, see `student.views`; the scores have the rows of all views.
    """

    batch: Batch
    processors: tuple[Processor, ...] = ()
    views: tuple[View, ...] = ()


def setting(default: Value, help: str, least: float = -math.inf, most: float = math.inf) -> Value:
    """Declare a setting of a method: a bool, an int, a float, a text, or a `Literal` of texts.

    Args:
        default: the published value; an empty text if the user must give one, which `check` requires.
        help: one line for the command line.
        least: the smallest value of a number.
        most: the largest one.
    """
    value: Value = field(default=default, metadata={"help": help, "least": least, "most": most})
    return value


def settings_of(method: Method | type[Method]) -> list[Field[Any]]:
    """Return the settings of a method: the fields that are declared with `setting`."""
    return [item for item in fields(method) if "help" in item.metadata]


@dataclass(frozen=True)
class Method:
    """How the next token is chosen. The fields of a subclass are its settings, each declared with `setting`.

    Attributes:
        name: what the command line and scores.json call it.
        beams: why it cannot be combined with beam search; empty if it can.
        samples: why it cannot be combined with sampling; empty if it can.
        seeded: whether `Decoding.seed` has an effect without sampling.

    Raises:
        ConfigError: a number is out of range.
    """

    name: ClassVar[str]
    beams: ClassVar[str] = ""
    samples: ClassVar[str] = ""
    seeded: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for item in settings_of(self):
            value = getattr(self, item.name)
            if isinstance(value, (int, float)) and not _is_within(value, item):
                raise ConfigError(f"{self.option(item.name)} is {value}; it must be {describe_range(item)}")

    def check(self, spec: ModelSpec, config: StudentConfig) -> None:
        """Refuse a student that the method cannot work with, before its weights are read.

        Args:
            spec: the student's parts, without weights.
            config: the student's settings.

        Raises:
            ConfigError: it cannot; the message has the reason and names methods or students that can.
        """

    @property
    def learned_from(self) -> tuple[str, ...]:
        """Fingerprints of the shards from which `prepare` has learned, which must not be evaluated."""
        return ()

    def prepare(self, student: Student, collator: Collator) -> Self:
        """Return the method with what it has to learn of the student before the first batch.

        Args:
            student: the student.
            collator: makes batches of questions.
        """
        return self

    @contextmanager
    def applied(self, student: Student, batch: Batch, decoding: Decoding) -> Iterator[Prepared]:
        """Change the generation of a batch, inside the context.

        Args:
            student: the student.
            batch: questions, left-padded.
            decoding: the settings of generation.
        """
        yield Prepared(batch)

    def generate(
        self, student: Student, batch: Batch, decoding: Decoding, **tokens: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Generate answers.

        Args:
            student: the student.
            batch: questions, left-padded.
            decoding: the settings of generation.
            **tokens: the ids of special tokens, passed to `Student.generate`.

        Returns:
            Token ids [B, T] of the answers, and the attention [I, N] of the first tapped block, None for a batch
            without images.
        """
        with self.applied(student, batch, decoding) as prepared:
            found = student.generate(prepared.batch, **decoding.arguments(prepared), **tokens)
        ids_BT, maps_IN = found
        return ids_BT[: len(batch.input_ids)], None if maps_IN is None else maps_IN[: len(batch.image_sample)]

    def option(self, key: str) -> str:
        """Return the option of a setting on the command line."""
        return f"--decoding.{self.name}.{key}"

    def describe(self) -> dict[str, Any]:
        """Return the name and the settings, as JSON values, with the keys of the command line."""
        own = {f"decoding.{item.name}": getattr(self, item.name) for item in settings_of(self)}
        return {"decoding": self.name, **own}


@dataclass(frozen=True)
class Greedy(Method):
    """The most probable token; with `Decoding.num_beams` beam search, with `Decoding.do_sample` the nucleus."""

    name: ClassVar[str] = "greedy"


@dataclass(frozen=True)
class Decoding:
    """Settings of generation. The default is greedy decoding.

    Attributes:
        max_new_tokens: limit of an answer, in tokens.
        num_beams: beams of beam search; 1 is greedy. The sum of log probabilities is divided by the length.
        do_sample: sample from the nucleus.
        top_p: the nucleus is the smallest set of most probable tokens with at least this probability.
        temperature: the logits are divided by it before.
        seed: with a sample's key, seeds the sample's own random numbers.
        method: how the next token is chosen.

    Raises:
        ConfigError: a value is out of range, or has no effect.
    """

    max_new_tokens: int = 128
    num_beams: int = 1
    do_sample: bool = False
    top_p: float = 1.0
    temperature: float = 1.0
    seed: int = 0
    method: Method = Greedy()

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "num_beams"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{_option(name)} is {getattr(self, name)}; it must be at least 1")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"--top-p is {self.top_p}; it must be greater than 0 and at most 1")
        if not 0 < self.temperature < float("inf"):
            raise ConfigError(f"--temperature is {self.temperature}; it must be greater than 0")
        if self.do_sample and self.num_beams > 1:
            raise ConfigError(f"--num-beams {self.num_beams} and --do-sample exclude each other; choose one of them")
        for name, default in (("top_p", 1.0), ("temperature", 1.0), ("seed", 0)):
            used = self.do_sample or (name == "seed" and self.method.seeded)
            if not used and getattr(self, name) != default:
                raise ConfigError(
                    f"{_option(name)} {getattr(self, name)} has no effect without --do-sample; add it, or leave "
                    f"{_option(name)} out"
                )
        self._check_method()

    def prepare(self, student: Student, collator: Collator) -> Decoding:
        """Return the settings with a method that can be applied to the student, see `Method.prepare`."""
        return replace(self, method=self.method.prepare(student, collator))

    def arguments(self, prepared: Prepared) -> dict[str, Any]:
        """Return the arguments of `Student.generate` for a batch."""
        batch, processors = prepared.batch, list(prepared.processors)
        found: dict[str, Any] = {
            "max_new_tokens": self.max_new_tokens,
            "num_beams": self.num_beams,
            "do_sample": False,  # transformers would draw from one generator for the whole batch
        }
        if self.do_sample:
            prompt, device = batch.input_ids.shape[1], batch.input_ids.device
            limit, keys = self.max_new_tokens, batch.keys * max(1, len(prepared.views))
            processors.append(NucleusSampler(self.temperature, self.top_p, self.seed, limit, keys, prompt, device))
        found |= {"views": prepared.views} if prepared.views else {}
        return found | ({"logits_processor": processors} if processors else {})

    def describe(self) -> dict[str, Any]:
        """Return all settings as JSON values."""
        own = {item.name: getattr(self, item.name) for item in fields(self) if item.name != "method"}
        return own | self.method.describe()

    def _check_method(self) -> None:
        method = self.method
        for used, reason, option in (
            (self.num_beams > 1, method.beams, f"--num-beams {self.num_beams}"),
            (self.do_sample, method.samples, "--do-sample"),
        ):
            if used and reason:
                raise ConfigError(f"--decoding {method.name} cannot be combined with {option}: {reason}; leave it out")


def describe_range(item: Field[Any]) -> str:
    """Say which numbers a setting takes, in words."""
    least, most = item.metadata["least"], item.metadata["most"]
    if least == -math.inf and most == math.inf:
        return "a finite number"
    if math.inf in (most, -least):
        return f"at least {least:g}" if most == math.inf else f"at most {most:g}"
    return f"from {least:g} to {most:g}"


def _is_within(value: float, item: Field[Any]) -> bool:
    return math.isfinite(value) and bool(item.metadata["least"] <= value <= item.metadata["most"])


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"
