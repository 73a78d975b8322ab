"""VHR: attention heads whose output the image changes are reinforced.

Source: He et al., "Cracking the Code of Hallucination in LVLMs with Vision-aware Head Divergence", ACL 2025
(arXiv 2412.13949).

Let A be the output of a head at the prompt's last token, before the output projection, and A' the same without the
image. The head's divergence is `d = |A - A'|`. It is set to 0 where d and `|A'|^2` both exceed their mean over the
block's heads by more than their standard deviation: the output grew because the image was taken away. The outputs of
the heads whose d is greater than the median of the block are multiplied by `alpha`, in the pass over the prompt and in
all later ones.

Blocks are decided in order, within the pass over the prompt, so A contains the reinforcement of the blocks before. The
paper reinforces the second block and the last 14 of 32; for other depths the same share of the blocks is taken here. It
leaves open whether A' contains the reinforcement, too: here it does not, since the text is read once, beforehand. The
standard deviation is the unbiased estimate. A change of less than a thousandth of A is regarded as rounding, d = 0: a
block whose window does not reach the image would otherwise reinforce heads by chance. A sample without an image is
decoded as without the method.

Shape suffixes: B samples, R rows of a pass, H heads, L tokens, D head dimension.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from medalign.contracts import Batch
from medalign.decoding.base import Decoding, Method, Prepared, setting
from medalign.decoding.contrast import without_images
from medalign.decoding.interventions import RecordedHeads
from medalign.student.capture import Output, intervening
from medalign.student.model import Student

_ROUNDING = 1e-3


@dataclass(frozen=True)
class VHR(Method):
    """Vision-aware head reinforcement."""

    name: ClassVar[str] = "vhr"

    alpha: float = setting(2.0, "factor of the outputs of vision-aware heads", least=0, most=1000)
    share: float = setting(14 / 32, "share of the blocks, the last ones, whose heads are reinforced", 0, 1)
    second_block: bool = setting(True, "whether heads of the second block are reinforced, too")

    @contextmanager
    def applied(self, student: Student, batch: Batch, decoding: Decoding) -> Iterator[Prepared]:
        """Read the questions without images, and reinforce heads inside the context."""
        has_image_B = (batch.image_index >= 0).any(1)
        if not has_image_B.any():
            yield Prepared(batch)
            return
        count = len(student.spec.blocks)
        blocks = {*range(count - round(self.share * count), count), *([1] if self.second_block else [])}
        chosen = [student.spec.attentions[block] for block in sorted(blocks)]
        records = {attention: RecordedHeads() for attention in chosen}
        with intervening(records):
            student.generate(without_images(batch), max_new_tokens=1, do_sample=False, pad_token_id=0)
        heads = {
            attention: ReinforcedHeads(record.last_BHD, has_image_B, self.alpha)
            for attention, record in records.items()
            if record.last_BHD is not None
        }
        with intervening(heads):
            yield Prepared(batch)


class ReinforcedHeads:
    """Multiplies the outputs of the vision-aware heads of a block, which the first pass decides.

    Args:
        without_BHD: output of each head at the prompt's last token without the image, float32.
        has_image_B: whether a sample has an image; the others are not changed.
        alpha: the factor.
    """

    def __init__(self, without_BHD: torch.Tensor, has_image_B: torch.Tensor, alpha: float) -> None:
        self._without_BHD, self._has_image_B, self._alpha = without_BHD, has_image_B, alpha
        self._gain_RH: torch.Tensor | None = None

    def __call__(self, attend: Any, module: nn.Module, /, *inputs: Any, **kwargs: Any) -> Output:
        """Call the backend and multiply its output."""
        output_RLHD, weights = attend(module, *inputs, **kwargs)
        if self._gain_RH is None:
            copies = len(output_RLHD) // len(self._without_BHD)  # the beams of a sample are consecutive rows
            aware_BH = vision_aware_heads(output_RLHD[::copies, -1].float(), self._without_BHD)
            gain_BH = torch.where(aware_BH & self._has_image_B[:, None], self._alpha, 1.0).to(output_RLHD.dtype)
            self._gain_RH = gain_BH.repeat_interleave(copies, dim=0)
        return output_RLHD * self._gain_RH[:, None, :, None], weights


def vision_aware_heads(with_BHD: torch.Tensor, without_BHD: torch.Tensor) -> torch.Tensor:
    """Return which heads of a block are vision-aware, bool [B, H].

    Args:
        with_BHD: output of each head with the image.
        without_BHD: output of each head without it.
    """
    divergence_BH = (with_BHD - without_BHD).norm(dim=-1)
    divergence_BH = divergence_BH.masked_fill(divergence_BH < _ROUNDING * with_BHD.norm(dim=-1), 0)
    size_BH = without_BHD.square().sum(-1)
    divergence_BH = divergence_BH.masked_fill(_stands_out(divergence_BH) & _stands_out(size_BH), 0)
    aware_BH: torch.Tensor = divergence_BH > divergence_BH.median(-1, keepdim=True).values
    return aware_BH


def _stands_out(values_BH: torch.Tensor) -> torch.Tensor:
    return values_BH > values_BH.mean(-1, keepdim=True) + values_BH.std(-1, keepdim=True)
