"""M3ID: Multi-Modal Mutual-Information Decoding (Favero et al., CVPR 2024, arXiv 2403.14003).

    scores = c + w_t (c - u)              c, u: log probabilities with and without the image
    w_t = (1 - g_t) / g_t,  g_t = exp(-lambda t)                    t = 1 for the first token of the answer

The weight grows with the answer, because the answer's own tokens hide the image more and more.

The paper corrects only where the student is unsure, max p(c) < threshold. Its authors published no code. The
implementation that later papers compare with is part of AvisC (github.com/sangminwoo/AvisC). It corrects always, with
lambda 0.02, and applies the adaptive plausibility constraint with beta 0.1. These are the defaults. A `threshold` below
1 with `beta` 0 is the paper's rule; the threshold has to be chosen for the student.

The second view is the prompt without its image tokens. Text that a family writes around an image remains.

Shape suffixes: B samples, V vocabulary size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

import torch

from medalign.contracts import Batch
from medalign.decoding.base import Decoding, setting
from medalign.decoding.contrast import Contrast, amplify, plausible, without_images
from medalign.student.model import Student

_LARGEST = 30.0  # of lambda t: c is far below the rounding of w_t (c - u) then, and the scores stay finite


@dataclass(frozen=True)
class M3ID(Contrast):
    """Contrast with no image, whose weight grows with the answer."""

    name: ClassVar[str] = "m3id"

    decay: float = setting(0.02, "lambda: how fast the weight grows with the answer, per token", least=0)
    beta: float = setting(0.1, "smallest probability of a token, relative to the most probable one", least=0, most=1)
    threshold: float = setting(1.0, "correct only where no token is at least this probable", least=0, most=1)

    @contextmanager
    def second_view(self, student: Student, batch: Batch, decoding: Decoding) -> Iterator[Batch]:
        """See `Contrast.second_view`."""
        yield without_images(batch)

    def combine(self, first_BV: torch.Tensor, second_BV: torch.Tensor, step: int) -> torch.Tensor:
        """See `Contrast.combine`."""
        weight = math.expm1(min(self.decay * (step + 1), _LARGEST))  # (1 - g) / g
        with_BV, without_BV = first_BV.log_softmax(-1), second_BV.log_softmax(-1)
        scores_BV = plausible(amplify(with_BV, without_BV, weight), first_BV, self.beta)
        if self.threshold == 1:
            return scores_BV
        return scores_BV.where(with_BV.amax(-1, keepdim=True).exp() < self.threshold, with_BV)
