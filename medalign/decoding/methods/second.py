"""SECOND: Selective and Contrastive Decoding (Park et al., ICML 2025, arXiv 2506.08391).

    logits = l_S + alpha (l_S - l_S-1) + beta (l_S-1 - l_S-2) + gamma (l_S-2 - l_S-3)
    tokens: the `top` most probable ones under l_S

l_k are the logits with the image tokens of the first k of S scales, one after another. Each scale has twice as many
tokens per side as the one before, and the last one is the student's own. Of the first scale all tokens are read, of the
others those that the scales before select:

1. At each scale j that was read, the attention of the last token to the image tokens, averaged over heads, divided by
   its sum over all tokens but the first, averaged over blocks, and divided by its sum over the scale's tokens, is
   multiplied by the attention between the patches in the vision tower, without its class token, averaged over heads and
   blocks. The product is a map. It is divided by its largest value, enlarged to the last scale's grid, set to 0 where
   the scale's tokens were not read, and multiplied by 4^j. The maps of all scales are added.
2. H is the map's entropy in proportion to the largest possible one. The share of tokens that are read at the next scale
   is (exp(lambda H) - 1) / (exp(lambda) - 1), at least 0.1: those where the map is largest, and what equals them.

The defaults are those of the authors' script for POPE (github.com/AIDASLab/SECOND): 0.8 for each difference, lambda 1,
20 tokens. Their script for VQAv2 has gamma 0.1, beta 0.2, alpha 0.1, lambda 0.5. They have four scales with LLaVA-NeXT,
whose last one are the tiles; three of them are those of a student that sees the image once. The paper's project page
says that H is the entropy of the attention; the code computes the mean entropy of the map's rows, which `entropy`
chooses. The code selects again for each new token and reads all prompts again; here only those are read again whose
selection has changed, which gives the same. `reselect false` selects once. The code has other forms of the contrast,
which its scripts do not use.

Each image of a sample is selected for itself. A sample without an image is decoded as usual.

Shape suffixes: B samples, L tokens, V vocabulary size, I images, N image tokens of a scale, G tokens per side at
the last scale, S scales, T tokens of an answer so far.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from medalign.config import StudentConfig
from medalign.contracts import Batch
from medalign.decoding.base import Decoding, Method, Prepared, setting
from medalign.decoding.contrast import NO_BEAMS
from medalign.decoding.scale_reader import ScaleReader
from medalign.errors import ConfigError
from medalign.student.families.base import ModelSpec
from medalign.student.model import Student

_LEAST_SHARE = 0.1


@dataclass(frozen=True)
class SECOND(Method):
    """Selection of image tokens from coarse to fine, and contrast of the scales."""

    name: ClassVar[str] = "second"
    beams: ClassVar[str] = NO_BEAMS

    scales: int = setting(3, "scales of the image; the authors have 4 with LLaVA-NeXT", least=2, most=4)
    alpha: float = setting(0.8, "weight of the last scale's difference to the one before", least=0, most=1000)
    beta: float = setting(0.8, "weight of the difference before that, with 3 or 4 scales", least=0, most=1000)
    gamma: float = setting(0.8, "weight of the first difference of 4 scales", least=0, most=1000)
    strictness: float = setting(1.0, "lambda: the larger, the fewer tokens are selected", least=0.001, most=100)
    top: int = setting(20, "most probable tokens under the last scale, of which one is chosen", least=1)
    entropy: Literal["rows", "map"] = setting("rows", "of each row of the map as in the code, or of the whole map")
    reselect: bool = setting(True, "whether tokens are selected again for each new token; false: once")

    def __post_init__(self) -> None:
        super().__post_init__()
        for least, name in ((3, "beta"), (4, "gamma")):
            default = type(self).__dataclass_fields__[name].default
            if self.scales < least and getattr(self, name) != default:
                raise ConfigError(
                    f"{self.option(name)} {getattr(self, name)} has no effect with {self.scales} scales; leave it out, "
                    f"or set {self.option('scales')} to at least {least}"
                )

    def check(self, spec: ModelSpec, config: StudentConfig) -> None:
        """See `Method.check`."""
        try:
            spec.family.patch_attention(spec)
        except LookupError as reason:
            raise ConfigError(
                f"--decoding second reads the image at several scales; this student is a {spec.family.model_type}, and "
                f"{reason}; choose another method"
            ) from reason
        if spec.grid.columns % 2 ** (self.scales - 1):
            raise ConfigError(
                f"{self.option('scales')} is {self.scales}, but the student's grid of {spec.grid.columns} x "
                f"{spec.grid.rows} tokens cannot be halved {self.scales - 1} times; choose fewer scales"
            )

    @torch.no_grad()
    def generate(
        self, student: Student, batch: Batch, decoding: Decoding, **tokens: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """See `Method.generate`."""
        if not (batch.image_index >= 0).any():
            return super().generate(student, batch, decoding, **tokens)
        ends = torch.tensor(tokens["eos_token_id"] or [], device=batch.input_ids.device)
        processors = decoding.arguments(Prepared(batch)).get("logits_processor", [])
        reader = ScaleReader(student, batch, self.scales, self.select, self.reselect)
        has_image_B1 = (batch.image_index >= 0).any(1, keepdim=True)
        ids_BT, running_B = batch.input_ids[:, :0], torch.ones_like(batch.input_ids[:, 0], dtype=torch.bool)
        while ids_BT.shape[1] < decoding.max_new_tokens and running_B.any():
            logits_SBV = reader.logits(ids_BT, running_B)
            scores_BV = self.combine(logits_SBV).where(has_image_B1, logits_SBV[-1])
            for process in processors:
                scores_BV = process(torch.cat([batch.input_ids, ids_BT], dim=1), scores_BV)
            token_B = scores_BV.argmax(-1).where(running_B, tokens["pad_token_id"])
            ids_BT = torch.cat([ids_BT, token_B[:, None]], dim=1)
            running_B = running_B & ~torch.isin(token_B, ends)
        return ids_BT, reader.attention_IN

    def combine(self, logits_SBV: torch.Tensor) -> torch.Tensor:
        """Return the scores of the next token, [B, V].

        Args:
            logits_SBV: of the scales, from coarse to fine.
        """
        scores_BV = last_BV = logits_SBV[-1]
        for place, weight in enumerate((self.alpha, self.beta, self.gamma)[: self.scales - 1]):
            scores_BV = scores_BV + weight * (logits_SBV[-1 - place] - logits_SBV[-2 - place])
        least_B1 = last_BV.topk(min(self.top, last_BV.shape[1])).values[:, -1:]
        return scores_BV.masked_fill(last_BV < least_B1, -torch.inf)

    def select(self, map_IGG: torch.Tensor) -> torch.Tensor:
        """Return where tokens of the next scale are read, bool [I, G, G].

        Args:
            map_IGG: the sum of the maps.
        """
        side = map_IGG.shape[-1]
        parts = map_IGG.flatten(1)[:, None] if self.entropy == "map" else map_IGG
        shares = parts / parts.sum(-1, keepdim=True) + 1e-9
        entropy_I = -(shares * shares.log()).sum(-1).mean(-1).double() / math.log(parts.shape[-1])
        share_I = torch.expm1(self.strictness * entropy_I) / math.expm1(self.strictness)
        counts_I = (share_I.clamp(_LEAST_SHARE, 1) * side**2).int().clamp(min=1)
        sorted_IN = map_IGG.flatten(1).sort(descending=True).values
        least_I1 = sorted_IN.gather(1, counts_I[:, None].long() - 1)
        return map_IGG >= least_I1[..., None]
