"""The training loss: `L = L_LM + alpha L_vis + beta L_att` (the paper's total objective)."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from medalign.contracts import Batch, LossReport, LossTerm, StudentOutput, TeacherTargets
from medalign.losses.attention import NORMALIZATIONS, attention_term
from medalign.losses.language_model import MEANS, language_model, supervised_samples, supervised_tokens
from medalign.losses.token_similarity import WEIGHTINGS, attention_weights, similarity_term

LANGUAGE, SIMILARITY, ATTENTION = "language", "similarity", "attention"


class Objective:
    """Weighs and adds the terms "language", "similarity" and "attention".

    Args:
        alpha: coefficient of the spatial alignment loss.
        beta: coefficient of the attention loss.
        normalize: how attention becomes a distribution: sum, softmax or official.
        language_mean: the language loss is a mean over answer "tokens", or over "samples" of each one's mean.
        ignore_padding: leave patches of canvas padding alone out of both distillation losses.
        impl: implementation of the kernels.
        weighting: weights of the token pairs in the spatial loss: "uniform", or "teacher_attention" (w_i w_j, w
            the teacher's attention scaled to mean 1).

    Raises:
        ValueError: a negative coefficient, or a name that does not exist.
    """

    def __init__(
        self,
        alpha: float,
        beta: float,
        normalize: str = "sum",
        ignore_padding: bool = False,
        impl: str = "auto",
        weighting: str = "uniform",
        language_mean: str = "tokens",
    ) -> None:
        if alpha < 0 or beta < 0:
            raise ValueError(f"Objective: alpha {alpha} and beta {beta} must not be negative")
        for name, value, known in (
            ("normalize", normalize, NORMALIZATIONS),
            ("weighting", weighting, WEIGHTINGS),
            ("language_mean", language_mean, MEANS),
        ):
            if value not in known:
                raise ValueError(f'Objective: {name}="{value}" is none of {", ".join(known)}')
        self.coefficients = {LANGUAGE: 1.0, SIMILARITY: alpha, ATTENTION: beta}
        self.normalize = normalize
        self.ignore_padding = ignore_padding
        self.impl = impl
        self.weighting = weighting
        self.language_mean = language_mean

    def coefficient(self, name: str) -> float:
        """What the term `name` is multiplied with in the total."""
        return self.coefficients[name]

    def counts(self, batch: Batch) -> dict[str, torch.Tensor]:
        """The count of every term, from the batch alone: known before the forward pass, so that ranks can add up."""
        sample_BL = self._samples(batch)
        return {
            LANGUAGE: supervised_tokens(batch.labels)
            if sample_BL is None
            else supervised_samples(batch.labels, sample_BL),
            SIMILARITY: batch.image_weight.float().sum(),
            ATTENTION: _asked_about(batch).sum(),
        }

    def __call__(
        self, output: StudentOutput, targets: TeacherTargets | None, batch: Batch, scale: Mapping[str, float]
    ) -> LossReport:
        """The terms of a micro-batch, and `total = sum of coefficient * term.sum * scale[name]`.

        `scale` holds for each term one over its count in the global batch (times whatever the caller's reduction
        divides by). A term with coefficient 0 is reported without gradient where its inputs are there and left
        out where they are not. Images of weight 0 stay in the graph, with gradient zero: under ZeRO-3 every rank
        must run the same backward pass.

        Raises ValueError if a term has a coefficient and lacks an input.
        """
        terms = {LANGUAGE: language_model(output.logits, output.kept, batch.labels, self._samples(batch))}
        for name, compute in ((SIMILARITY, self._similarity), (ATTENTION, self._attention)):
            with torch.set_grad_enabled(torch.is_grad_enabled() and self.coefficients[name] > 0):
                term = compute(output, targets, batch)
            if term is not None:
                terms[name] = term
            elif self.coefficients[name] > 0:
                raise ValueError(
                    f"Objective: {name} has coefficient {self.coefficients[name]}, "
                    f"but there are no {'teacher targets' if targets is None else 'tapped values of the student'}"
                )
        total = terms[LANGUAGE].sum * scale[LANGUAGE]
        for name in (SIMILARITY, ATTENTION):
            if name in terms and self.coefficients[name] > 0:
                total = total + self.coefficients[name] * scale[name] * terms[name].sum
        return LossReport(terms=terms, total=total)

    def _similarity(self, output: StudentOutput, targets: TeacherTargets | None, batch: Batch) -> LossTerm | None:
        if output.tokens is None or targets is None:
            return None
        mask = self._mask(batch)
        weighted = self.weighting == "teacher_attention"
        pair_weight = attention_weights(targets.attention, mask) if weighted else None
        weight = batch.image_weight.float()
        return similarity_term(output.tokens, targets.features, weight, mask, pair_weight, self.impl)

    def _attention(self, output: StudentOutput, targets: TeacherTargets | None, batch: Batch) -> LossTerm | None:
        if output.attention is None or targets is None:
            return None
        return attention_term(
            output.attention, targets.attention, _asked_about(batch), self._mask(batch), self.normalize
        )

    def _samples(self, batch: Batch) -> torch.Tensor | None:
        return batch.sample_of_token() if self.language_mean == "samples" else None

    def _mask(self, batch: Batch) -> torch.Tensor | None:
        return batch.patch_valid if self.ignore_padding else None


def _asked_about(batch: Batch) -> torch.Tensor:
    """1 for each real image whose sample has rows of the attention loss, else 0; [I] float32."""
    asking = batch.sample_of_token().flatten(), batch.rows.flatten().float()
    asking_S = torch.zeros(len(batch.bounds()) - 1, device=batch.input_ids.device).index_add_(0, *asking) > 0
    return batch.image_weight.float() * asking_S[batch.image_sample]
