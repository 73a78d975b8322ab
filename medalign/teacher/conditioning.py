"""Attention targets that follow the question.

The class token's attention is the same for every question about an image. Where a question names a finding, the
text-conditioned map takes its place, or a share of it:

    v_i = proj(norm(W_o (W_v x_i + b_v) + b_o))                       patch i on the value path of the last block
    r_i = cos(v_i, p) - gamma cos(v_i, a)                             its relevance for the finding
    s   = softmax(r / tau)                                            over the M patches
    t   = (1 - lambda) c / sum(c) + lambda s                          c: the class token's attention

In a sample that asks for a report, `reports` counts the findings that the report states as present.

x_i is the normed input of the block; p and a are the mean embeddings of prompts where the finding is present and where
it is absent. A patch on the value path attends only to itself, so its place is kept: MaskCLIP (Zhou, Loy and Dai,
"Extract Free Dense Labels from CLIP", ECCV 2022). The residual stream and the MLP are left out; ClearCLIP (Lan et al.,
ECCV 2024) finds that they disturb dense features. A pooling head is treated in the same way: each patch is pooled as if
it were the only one.

Shape suffixes: I images, M patches, e width of the space of texts, F findings.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

from medalign.teacher.lexicon import Lexicon


class TextConditioning(nn.Module):
    """Mixes text-conditioned maps into the attention targets.

    Args:
        lexicon: the findings that a question can name.
        present: mean embedding of each finding's prompts where it is present, [F, e].
        absent: the same where it is absent, [F, e].
        weight: lambda, the share of the text-conditioned map where a finding is named.
        temperature: tau.
        absent_weight: gamma.
        reports: whether the findings that a report states as present count as named.
    """

    def __init__(
        self,
        lexicon: Lexicon,
        present: torch.Tensor,
        absent: torch.Tensor,
        *,
        weight: float,
        temperature: float,
        absent_weight: float,
        reports: bool = False,
    ) -> None:
        super().__init__()
        self.present: torch.Tensor
        self.absent: torch.Tensor
        self.register_buffer("present", present.float(), persistent=False)
        self.register_buffer("absent", absent.float(), persistent=False)
        self.lexicon = lexicon
        self.weight = weight
        self.temperature = temperature
        self.absent_weight = absent_weight
        self.reports = reports

    def relevance(self, values: torch.Tensor) -> torch.Tensor:
        """Compare patches with all prompts, before it is known which findings are asked for.

        Args:
            values: patches on the value path, [I, M, e].

        Returns:
            Products of the normalized patches with the prompts' mean embeddings, [I, M, 2 F] in float32: where the
            findings are present, then where they are absent.
        """
        return F.normalize(values.float(), dim=-1) @ torch.cat([self.present, self.absent]).T

    def forward(
        self,
        attention: torch.Tensor,
        relevance: torch.Tensor,
        questions: Sequence[str],
        reports: Sequence[str] = (),
    ) -> torch.Tensor:
        """Mix the maps.

        Args:
            attention: the class token's, or the pooling head's, [I, M].
            relevance: what `relevance` gives for the same images, [I, M, 2 F].
            questions: the question about each image. Where it names several findings, their prompts are averaged.
            reports: the report of each image; empty for other tasks.

        Returns:
            Attention targets [I, M] in float32. Each sums to 1.

        Raises:
            ValueError: the number of questions, or of reports if they count, is not I.
        """
        if len(questions) != len(attention):
            raise ValueError(f"TextConditioning: {len(questions)} questions for {len(attention)} images")
        if self.reports and len(reports) != len(attention):
            raise ValueError(f"TextConditioning: {len(reports)} reports for {len(attention)} images")
        named_IF = self._named(questions, reports).to(attention.device, non_blocking=True)
        weight_I1 = self.weight * named_IF.any(1, keepdim=True)
        own_IM = attention.float() / attention.float().sum(1, keepdim=True)
        return torch.lerp(own_IM, self._text_map(relevance, named_IF), weight_I1)

    def _text_map(self, relevance: torch.Tensor, named: torch.Tensor) -> torch.Tensor:
        """Compute the map s [I, M] for the findings that are asked for, bool [I, F]."""
        present_IM, absent_IM = (
            torch.einsum("imf,if->im", products_IMF, _shares(named.float(), texts_Fe))
            for products_IMF, texts_Fe in zip(relevance.chunk(2, dim=-1), (self.present, self.absent), strict=True)
        )
        return ((present_IM - self.absent_weight * absent_IM) / self.temperature).softmax(dim=-1)

    def _named(self, questions: Sequence[str], reports: Sequence[str]) -> torch.Tensor:
        """Which findings each question names, or each report states if they count, bool [I, F], on the host."""
        found = [self.lexicon.named(question) for question in questions]
        if self.reports:
            found = [names | self.lexicon.stated(report) for names, report in zip(found, reports, strict=True)]
        return torch.tensor([[finding in names for finding in self.lexicon.findings] for names in found])


def _shares(named: torch.Tensor, texts: torch.Tensor) -> torch.Tensor:
    """Divide the rows of `named`, [I, F], by the length of the sum of the named texts, [F, e].

    The cosine of a patch with the sum of texts is then the sum of its products with them by these shares.
    """
    length: torch.Tensor = torch.linalg.vector_norm(named @ texts, dim=-1, keepdim=True)
    return named / length.clamp_min(1e-12)
