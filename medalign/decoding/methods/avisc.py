"""AvisC: Attentional Vision Calibration (Woo et al., Findings of ACL 2025, arXiv 2405.17820).

    logits = (1 + alpha) l(v) - alpha l(v')             v': zeros in the place of tokens that are not blind
    plausible tokens: p(v) >= beta max p(v)

Blind tokens attract attention whatever is asked. a_k are the weights of the prompt's last token on the image tokens
at block k, averaged over heads. The blocks with the largest sums of a_k are taken until they have the share `gamma` of
all these sums. a is the mean of a_k over these blocks; the tokens with a >= mean(a) + lambda std(a) are blind. All
images of a sample count as one.

The defaults are those of the authors' scripts (github.com/sangminwoo/AvisC): gamma 0.5, lambda 1, alpha 1, beta 0.1.
The authors sample from the contrast; here that is `do_sample`. As with them, the attention is read in the first view's
pass over the prompt, and the second view's pass follows; the passes over new tokens are shared.

Shape suffixes: B samples, L tokens, V vocabulary size, K blocks, H heads.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from medalign.contracts import Batch
from medalign.decoding.base import Decoding, Method, Prepared, setting
from medalign.decoding.contrast import NO_BEAMS, TwoViews, amplify, plausible
from medalign.decoding.interventions import RecordedRow
from medalign.student.capture import intervening
from medalign.student.model import Student
from medalign.student.views import Arguments, Forward


@dataclass(frozen=True)
class AvisC(Method):
    """Contrast with the blind tokens only."""

    name: ClassVar[str] = "avisc"
    beams: ClassVar[str] = NO_BEAMS

    alpha: float = setting(1.0, "weight of the contrast", least=0, most=1000)
    beta: float = setting(0.1, "smallest probability of a token, relative to the most probable one", least=0, most=1)
    gamma: float = setting(0.5, "share of the attention to the image that the chosen blocks have", least=0, most=1)
    deviations: float = setting(1.0, "lambda: standard deviations from the mean where tokens are blind", -1000, 1000)

    @contextmanager
    def applied(self, student: Student, batch: Batch, decoding: Decoding) -> Iterator[Prepared]:
        """See `Method.applied`."""
        image_BL = batch.image_index >= 0
        if not image_BL.any():
            yield Prepared(batch)
            return
        rows = {attention: RecordedRow() for attention in student.spec.attentions}

        def first(forward: Forward, arguments: Arguments) -> Any:
            with intervening(rows):
                return forward(**arguments)

        def second(forward: Forward, arguments: Arguments) -> Any:
            blind_BL = self.blind(attention_to_image(rows.values(), image_BL), image_BL)
            return forward(**student.spec.family.blank(arguments, image_BL & ~blind_BL))

        contrast = TwoViews(self.combine, image_BL.any(1), batch.input_ids.shape[1])
        yield Prepared(batch, (contrast,), (first, second))

    def combine(self, first_BV: torch.Tensor, second_BV: torch.Tensor, step: int) -> torch.Tensor:
        """Return the scores of the next token, as `Contrast.combine`."""
        return plausible(amplify(first_BV, second_BV, self.alpha), first_BV, self.beta)

    def blind(self, attention_BKL: torch.Tensor, image_BL: torch.Tensor) -> torch.Tensor:
        """Return which image tokens are blind, [B, L] bool.

        Args:
            attention_BKL: the weights of the last token on the image tokens, 0 elsewhere, for each block.
            image_BL: True at image tokens.
        """
        sum_BK = attention_BKL.sum(-1)
        sorted_BK, order_BK = (sum_BK / sum_BK.sum(-1, keepdim=True)).sort(stable=True, dim=-1, descending=True)
        before_BK = sorted_BK.cumsum(-1) - sorted_BK
        # A block is taken if those before it have less than gamma; the first one always is.
        taken_BK = (before_BK < self.gamma) | (torch.arange(sum_BK.shape[1], device=sum_BK.device) == 0)
        chosen_BK1 = torch.zeros_like(taken_BK).scatter(1, order_BK, taken_BK)[..., None]
        mean_BL = (attention_BKL * chosen_BK1).sum(1) / chosen_BK1.sum(1)
        limit_B1 = _mean(mean_BL, image_BL) + self.deviations * _deviation(mean_BL, image_BL)
        return image_BL & (mean_BL >= limit_B1)


def attention_to_image(rows: Iterable[RecordedRow], image_BL: torch.Tensor) -> torch.Tensor:
    """Return the weights of each prompt's last token on its image tokens, [B, K, L], 0 elsewhere: means over heads.

    Args:
        rows: of each block, recorded in a pass over the prompts.
        image_BL: True at image tokens.
    """
    parts = [row.weights_RHK for row in rows]
    return torch.stack([part.mean(1) for part in parts if part is not None], dim=1) * image_BL[:, None]


def _mean(values_BL: torch.Tensor, mask_BL: torch.Tensor) -> torch.Tensor:
    return (values_BL * mask_BL).sum(-1, keepdim=True) / mask_BL.sum(-1, keepdim=True)


def _deviation(values_BL: torch.Tensor, mask_BL: torch.Tensor) -> torch.Tensor:
    """The standard deviation of a sample of a population, as torch.std computes it."""
    squares_BL = (values_BL - _mean(values_BL, mask_BL)).square() * mask_BL
    return (squares_BL.sum(-1, keepdim=True) / (mask_BL.sum(-1, keepdim=True) - 1)).sqrt()
