"""A decoding method that is not part of the package: a bias that makes one token more or less likely."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from medalign.config import StudentConfig
from medalign.contracts import Batch
from medalign.decoding.base import Decoding, Method, Prepared, setting
from medalign.errors import ConfigError
from medalign.student.families.base import ModelSpec
from medalign.student.model import Student


@dataclass(frozen=True)
class Biased(Method):
    """Adds a number to the logit of a token."""

    name: ClassVar[str] = "biased"
    beams: ClassVar[str] = "it is only an example"

    token: int = setting(97, "the token", least=0)
    bias: float = setting(100.0, "what is added to its logit, up to 100 %", most=1000.0)
    shown: bool = setting(True, "whether it has an effect")
    sign: Literal["more", "less"] = setting("more", "whether the token becomes more or less likely")

    def check(self, spec: ModelSpec, config: StudentConfig) -> None:
        vocabulary = spec.language_model.config.vocab_size  # type: ignore[union-attr]
        if self.token >= vocabulary:
            raise ConfigError(f"{self.option('token')} is {self.token}, but the student has {vocabulary} tokens")

    @contextmanager
    def applied(self, student: Student, batch: Batch, decoding: Decoding) -> Iterator[Prepared]:
        def add(_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            added = torch.zeros_like(scores)
            added[:, self.token] = self.bias * self.shown * (1 if self.sign == "more" else -1)
            return scores + added

        yield Prepared(batch, (add,))


class NotAMethod:
    """Has no part in decoding."""
