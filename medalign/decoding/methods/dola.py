"""DoLa: Decoding by Contrasting Layers (Chuang et al., ICLR 2024, arXiv 2309.03883).

    scores = log q_N - log q_M            q_j: what the student's last norm and output layer predict from the input of
                                          block j; N is the output of the last block
    M = argmax_j JSD(q_N, q_j)            over every second j of a bucket, chosen anew for each token and sample
    plausible tokens: q_N >= beta max q_N

A bucket has up to 20 blocks. `low`, for long answers, is the first half (the first 20 of more than 40 blocks); `high`,
for short ones, is the second half (the last 20). Where the output layer is tied to the embeddings, j = 0 is left out,
since it predicts the token that was read. Scores of tokens that have occurred are divided by `repetition_penalty` if
they are positive, and multiplied by it otherwise (Keskar et al., arXiv 1909.05858).

Paper and code (github.com/voidism/DoLa) differ in the divergence: the Kullback-Leibler terms of the code have their
arguments the other way round (`divergence reversed`, the default, with which the published results were computed). For
several samples per batch, the code chooses one M; here, each sample has its own.

Only the token's own pass is used, so there is no second view, and samples without an image are contrasted too.

Shape suffixes: B samples, L tokens, V vocabulary size, D hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from medalign.config import StudentConfig
from medalign.contracts import Batch
from medalign.decoding.base import Decoding, Method, Prepared, setting
from medalign.decoding.contrast import plausible
from medalign.errors import ConfigError
from medalign.student.families.base import ModelSpec
from medalign.student.model import Student

_BUCKET = 20  # blocks


@dataclass(frozen=True)
class DoLa(Method):
    """Contrast with the prediction of an earlier block."""

    name: ClassVar[str] = "dola"
    beams: ClassVar[str] = "beams add log probabilities, and the scores of a contrast are not log probabilities"

    bucket: Literal["low", "high"] = setting("low", "blocks to contrast with: low for long answers, high for short")
    beta: float = setting(0.1, "smallest probability of a token, relative to the most probable one", least=0, most=1)
    divergence: Literal["reversed", "jensen_shannon"] = setting(
        "reversed", "what chooses the block: the measure of the authors' code, or of the paper"
    )
    repetition_penalty: float = setting(1.2, "makes tokens that have occurred less likely; 1 for none", 1, 1000)

    def check(self, spec: ModelSpec, config: StudentConfig) -> None:
        """See `Method.check`."""
        language: Any = spec.language_model
        if not isinstance(getattr(language, "norm", None), nn.Module):
            raise ConfigError(
                "--decoding dola needs the norm before the student's output layer, and this language model "
                f"({language.config.model_type}) has none of that name; choose another method"
            )
        if getattr(language.config, "final_logit_softcapping", None):
            raise ConfigError("--decoding dola cannot read blocks of a student whose logits are capped; choose another")
        self.candidates(spec)

    def candidates(self, spec: ModelSpec) -> list[int]:
        """Return the blocks whose inputs may be M. Raises ConfigError if there are none."""
        blocks = len(spec.blocks)
        half = min(blocks // 2, _BUCKET)
        tied = spec.model.get_output_embeddings().weight is spec.model.get_input_embeddings().weight
        low, high = range(2 if tied else 0, half, 2), range(max(blocks // 2, blocks - _BUCKET), blocks, 2)
        chosen = low if self.bucket == "low" else high
        if not chosen:
            raise ConfigError(
                f"{self.option('bucket')} is {self.bucket}, but none of the student's {blocks} blocks is a candidate "
                "there; choose high"
            )
        return list(chosen)

    @contextmanager
    def applied(self, student: Student, batch: Batch, decoding: Decoding) -> Iterator[Prepared]:
        """See `Method.applied`."""
        inputs: dict[int, torch.Tensor] = {}

        def record(block: int, _module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            hidden_BLD = args[0] if args else kwargs["hidden_states"]
            inputs[block] = hidden_BLD[:, -1]

        with ExitStack() as stack:
            for block in self.candidates(student.spec):
                hook = student.spec.blocks[block].register_forward_pre_hook(partial(record, block), with_kwargs=True)
                stack.callback(hook.remove)
            yield Prepared(batch, (partial(self._contrast, student.spec, batch, inputs),))

    def _contrast(
        self,
        spec: ModelSpec,
        batch: Batch,
        inputs: dict[int, torch.Tensor],
        input_ids: torch.Tensor,
        final_BV: torch.Tensor,
    ) -> torch.Tensor:
        """Return the scores of the next token, [B, V], given the tokens so far, [B, L], and the logits."""
        language: Any = spec.language_model
        last_BV = final_BV.log_softmax(-1)
        chosen_BV, largest_B1 = last_BV, final_BV.new_full((len(final_BV), 1), -torch.inf)
        for hidden_BD in inputs.values():
            early_BV = spec.model.get_output_embeddings()(language.norm(hidden_BD)).float().log_softmax(-1)
            distance_B1 = self._distance(last_BV, early_BV)
            chosen_BV = early_BV.where(distance_B1 > largest_B1, chosen_BV)
            largest_B1 = distance_B1.maximum(largest_B1)
        return self._penalize(plausible(last_BV - chosen_BV, final_BV, self.beta), input_ids, batch)

    def _distance(self, last_BV: torch.Tensor, early_BV: torch.Tensor) -> torch.Tensor:
        """Return how far two rows of log probabilities are from each other, [B, 1]."""
        mean_BV = torch.logaddexp(last_BV, early_BV) - math.log(2)  # of the probabilities, as a logarithm
        if self.divergence == "reversed":
            terms_BV = mean_BV.exp() * (2 * mean_BV - last_BV - early_BV)
        else:
            terms_BV = last_BV.exp() * (last_BV - mean_BV) + early_BV.exp() * (early_BV - mean_BV)
        return terms_BV.sum(-1, keepdim=True) / 2

    def _penalize(self, scores_BV: torch.Tensor, input_ids: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Penalize tokens of the prompt and of the answer; padding is none of them."""
        if self.repetition_penalty == 1:
            return scores_BV
        prompt = batch.input_ids.shape[1]
        occurred_BV = torch.zeros_like(scores_BV)
        occurred_BV.scatter_add_(1, input_ids[:, :prompt], batch.attention_mask.to(scores_BV.dtype))
        occurred_BV.scatter_(1, input_ids[:, prompt:], 1.0)
        factor = self.repetition_penalty
        penalized_BV = torch.where(scores_BV < 0, scores_BV * factor, scores_BV / factor)
        return torch.where(occurred_BV > 0, penalized_BV, scores_BV)
