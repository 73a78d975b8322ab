"""PAI: more attention to the image, and logits that the text by itself would not give.

Source: Liu, Zheng and Chen, "Paying More Attention to Image: A Training-Free Method for Alleviating Hallucination in
LVLMs", ECCV 2024 (arXiv 2407.21771), and the authors' code (github.com/LALBJ/PAI).

In the blocks from `first_block` on, the scores A of the current token, before the softmax, become `A + alpha |A|` at
the columns of the image. The logits are refined by those of the text without the image, which is read without a change
of its attention:

    gamma * logits(image, text) - (gamma - 1) * logits(text)

The default values are those of the code. Paper and code differ: the code keeps only tokens whose probability is at
least 0.1 times that of the most probable one; the paper's formula keeps all (`beta` 0). The code refines log
probabilities, which gives the same tokens. The refinement is optional: `gamma` 1 leaves it out, and the second view.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import ClassVar

import torch

from medalign.config import StudentConfig
from medalign.contracts import Batch
from medalign.decoding.base import Decoding, Prepared, setting
from medalign.decoding.contrast import Contrast, amplify, plausible, without_images
from medalign.decoding.interventions import AmplifiedImage
from medalign.errors import ConfigError
from medalign.student.capture import intervening
from medalign.student.families.base import ModelSpec
from medalign.student.model import Student


@dataclass(frozen=True)
class PAI(Contrast):
    """Amplified attention to the image, with logits refined by a view without it."""

    name: ClassVar[str] = "pai"

    alpha: float = setting(0.2, "how far the attention scores of the image are raised", least=0, most=1000)
    first_block: int = setting(2, "first block whose attention is changed, counted from 0", least=0)
    gamma: float = setting(1.1, "weight of the logits with the image; 1 leaves the view without it out", 1, 1000)
    beta: float = setting(0.1, "least probability relative to the most probable token; 0 as in the paper", 0, 1)

    def check(self, spec: ModelSpec, config: StudentConfig) -> None:
        """Refuse a first block that the student does not have."""
        super().check(spec, config)
        if self.first_block >= len(spec.blocks):
            raise ConfigError(
                f"{self.option('first_block')} is {self.first_block}, but the student's blocks have indices 0 to "
                f"{len(spec.blocks) - 1}; choose one of them"
            )

    @contextmanager
    def applied(self, student: Student, batch: Batch, decoding: Decoding) -> Iterator[Prepared]:
        """Amplify the image in the rows that have one."""
        with ExitStack() as stack:
            prepared = Prepared(batch)
            if self.gamma > 1:
                prepared = stack.enter_context(super().applied(student, batch, decoding))
            image_BL = prepared.batch.image_index >= 0
            chosen = student.spec.attentions[self.first_block :]
            limit = decoding.max_new_tokens
            stack.enter_context(intervening({each: AmplifiedImage(image_BL, self.alpha, limit) for each in chosen}))
            yield prepared

    @contextmanager
    def second_view(self, student: Student, batch: Batch, decoding: Decoding) -> Iterator[Batch]:
        """Yield the samples without their images."""
        yield without_images(batch)

    def combine(self, first_BV: torch.Tensor, second_BV: torch.Tensor, step: int) -> torch.Tensor:
        """Return the refined logits."""
        return plausible(amplify(first_BV, second_BV, self.gamma - 1), first_BV, self.beta)
