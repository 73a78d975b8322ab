"""The losses."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from medalign.config.value_types import NonNegativeFloat, PositiveFiniteFloat

Normalization = Literal["sum", "softmax", "official"]
LanguageMean = Literal["tokens", "samples"]
AttentionRows = Literal["prompt", "official"]
PairWeighting = Literal["uniform", "teacher_attention"]
KernelImpl = Literal["auto", "reference", "chunked", "triton"]


@dataclass
class LossConfig:
    """The training loss, L_LM + alpha L_vis + beta L_att."""

    alpha: NonNegativeFloat = 1.0
    """Coefficient of the spatial alignment loss; 0 disables it."""
    beta: NonNegativeFloat = 0.06
    """Coefficient of the attention loss; 0 disables it."""
    layer_weights: list[PositiveFiniteFloat] = field(default_factory=list)
    """With several tapped blocks (student.layer), one weight per block for both distillation losses; they are divided
    by their sum. Empty: all equal."""
    normalize: Normalization = "sum"
    """How attention becomes a distribution. sum: divided by its sum. softmax: softmax of its values. official: divided
    by its L2 norm, as in the released code; the loss may then be negative."""
    language_mean: LanguageMean = "tokens"
    """The mean of the language loss. tokens: over the answer tokens of the global batch. samples: over each sample's
    answer tokens, then over the samples of the global batch, as in the released code."""
    attention_rows: AttentionRows = "prompt"
    """Tokens after the image whose attention is distilled. prompt: the rest of the prompt. official: all tokens up to
    the last ":" of prompt and answer, as in the released code."""
    weighting: PairWeighting = "uniform"
    """Weights of the token pairs in the spatial loss. uniform: all equal. teacher_attention: the product of the
    teacher's attention to both tokens."""
    ignore_padding: bool = False
    """Exclude patches that show only canvas padding from both distillation losses."""
    impl: KernelImpl = "auto"
    """Implementation of the kernels. auto: triton on a GPU if it can run, else chunked. Any other implementation that
    cannot run is an error."""
    extra: list[str] = field(default_factory=list)
    """Import paths (package.module.factory) of callables that take the Config and return a further loss term. A term
    that needs the teacher requires teacher.path."""
