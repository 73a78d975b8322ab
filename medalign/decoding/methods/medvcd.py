"""Med-VCD (Mahdavi et al., Computers in Biology and Medicine 2026, arXiv 2512.01922): contrast without a second pass.

    scores = log_softmax(l - alpha e)        l: the student's logits; e: what its output layer predicts from the
                                             embedding of the last token, as if there were no blocks
    When an answer has m, 2 m, 3 m, ... entries in the cache, each for the first time, the oldest r of its n entries
    become one in every block, their mean:
    r = int((1 - kept) n)                    in floating point

Source: the authors' code (github.com/Omid-Nejati/MedVCD), which is that of VASparse (Zhuang et al., CVPR 2025, arXiv
2501.06553), and the paper of VASparse; the text of Med-VCD's own paper could not be read. The default values are those
of the code's README. Paper and code differ, and the code differs from itself:

- The paper's scores are (1 + alpha) l - alpha e (`amplified`), for the tokens of VCD's plausibility constraint (`beta`;
  the value is not given).
- The code's scripts subtract log_softmax(e) once more, for tokens that are at least a tenth as probable as the most
  probable one, and merge at multiples of 16: `alpha` 1.1, `beta` 0.1, `sentence` 16. As published, they stop at the
  first token: whether to contrast is read from the result of a detector, and they use none.
- In the paper, e is computed from embeddings of the image of which half are masked at random. In the code it is
  computed at the last position, where no image is read: the mask has no effect, and there is none here.
- The paper keeps 0.9 of an answer's tokens in each head: those with the largest (q k)^2 + 0.1 P, with P from their
  attention to the image; it adds up the others by clusters, whose number it does not give. The code takes the mean of
  the oldest.
- A counter of the code lets only one block merge at a time, and the positions of later tokens go back by what was
  removed, onto those of earlier ones. Here every block merges, and positions go on.
- The paper lowers the scores of tokens that gather attention. The code does not.

Only the token's own pass is used, so there is no second view, and samples without an image are contrasted, too.

Shape suffixes: R rows of a pass (samples, or beams), L tokens, V vocabulary size, D hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import nn

from medalign.config import StudentConfig
from medalign.contracts import Batch
from medalign.decoding.base import Decoding, Method, Prepared, setting
from medalign.decoding.contrast import plausible
from medalign.errors import ConfigError
from medalign.student.families.base import ModelSpec
from medalign.student.model import Student


@dataclass(frozen=True)
class MedVCD(Method):
    """Contrast with the prediction of the last token's embedding, and answers whose oldest tokens are merged."""

    name: ClassVar[str] = "medvcd"

    alpha: float = setting(0.1, "weight of what the last token's embedding predicts", least=0, most=1000)
    amplified: bool = setting(False, "whether the logits have weight 1 + alpha, as in the paper; false: 1")
    beta: float = setting(0.0, "smallest probability of a token, relative to the most probable one; 0: none", 0, 1)
    sentence: int = setting(32, "entries of an answer in the cache at whose multiples its oldest are merged", least=1)
    kept: float = setting(0.9, "share of the answer's entries that are not merged; 1: none is merged", 0, 1)

    def check(self, spec: ModelSpec, config: StudentConfig) -> None:
        """See `Method.check`."""
        text: Any = spec.language_model.config
        windows = any(spec.window(block) for block in range(len(spec.blocks)))
        several = "mrope_section" in (getattr(text, "rope_parameters", None) or {})
        scaled = any(getattr(text, key, None) for key in ("final_logit_softcapping", "embedding_multiplier"))
        if windows or several or scaled:
            raise ConfigError(
                "--decoding medvcd merges tokens in the cache and predicts from embeddings: it needs a student with "
                "one position per token, attention to all tokens, unscaled embeddings and logits without a cap, which "
                f"this one ({spec.family.model_type}, {text.model_type}) does not have; choose another method"
            )

    @contextmanager
    def applied(self, student: Student, batch: Batch, decoding: Decoding) -> Iterator[Prepared]:
        """See `Method.applied`."""
        merging = _Merging(batch.input_ids.shape[1], self.sentence, self.kept)
        language: Any = student.spec.language_model
        handle = language.register_forward_pre_hook(merging.before, with_kwargs=True)
        try:
            yield Prepared(batch, (partial(self._contrast, student.spec),))
        finally:
            handle.remove()

    def _contrast(self, spec: ModelSpec, input_ids: torch.Tensor, logits_RV: torch.Tensor) -> torch.Tensor:
        """Return the scores of the next token, [R, V], given the tokens so far, [R, L], and the logits."""
        embedded_RD = spec.model.get_input_embeddings()(input_ids[:, -1])
        early_RV = spec.model.get_output_embeddings()(embedded_RD).float()
        weight = 1 + self.alpha if self.amplified else 1
        # Beam search adds log probabilities.
        return plausible(weight * logits_RV - self.alpha * early_RV, logits_RV, self.beta).log_softmax(-1)


class _Merging:
    """Merges the oldest tokens of the answers in a cache.

    Args:
        prompt: L, tokens of the prompts with padding.
        sentence: entries of the answers at whose multiples it happens.
        kept: share of the entries that stay.
    """

    def __init__(self, prompt: int, sentence: int, kept: float) -> None:
        self._prompt, self._sentence, self._kept = prompt, sentence, kept
        self._sentences = self._removed = 0

    def before(self, _module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Change the cache and the mask of the next pass; a hook of the language model."""
        cache = kwargs.get("past_key_values")
        count = 0 if cache is None else cache.get_seq_length() - self._prompt
        if count > 0 and count % self._sentence == 0 and count // self._sentence > self._sentences:
            self._sentences += 1
            oldest = int((1 - self._kept) * count)
            if oldest > 1:
                self._merge(cache, oldest)
        mask_RL = kwargs.get("attention_mask")
        if self._removed and mask_RL is not None:
            first = self._prompt + 1
            kept = torch.cat([mask_RL[:, :first], mask_RL[:, first + self._removed :]], dim=1)
            kwargs = kwargs | {"attention_mask": kept}
        return args, kwargs

    def _merge(self, cache: Any, oldest: int) -> None:
        self._removed += oldest - 1
        start, end = self._prompt, self._prompt + oldest
        for layer in cache.layers:
            layer.keys, layer.values = (
                torch.cat([part[:, :, :start], part[:, :, start:end].mean(2, keepdim=True), part[:, :, end:]], dim=2)
                for part in (layer.keys, layer.values)
            )
