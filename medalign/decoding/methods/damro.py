"""DAMRO: Dive into the Attention Mechanism of LVLM to Reduce Object Hallucination (arXiv 2410.04514).

    logits = (1 + alpha) l(v) - alpha l(v')             v': an image of its `top` outlier tokens only
    plausible tokens: p(v) >= beta max p(v)

Outlier tokens are the patches to which the class token of the vision tower attends most. They are mostly background,
and the language model attends to them, too.

Source: Gong et al., EMNLP 2024. The defaults are those of the authors' code for LLaVA (github.com/coder-gx/DAMRO):
alpha 2, beta 0.1, 10 tokens. The paper describes the attention of the class token; the code computes it in its own way,
which settings choose:

- `heads joint`, the default: one softmax over the products of all channels, scaled by the square root of the width.
  `mean`: the tower's own attention, averaged over its heads.
- `tower_block`: -2, the block that gives LLaVA's features; an earlier version of the code took the last one, -1.
- `order attention`, the default: the tokens of v' follow each other by falling attention. `place`: as in the image.

The second view masks all other image tokens, and the positions close up, which equals leaving them out. The tower must
have a class token, and its patches must be the image tokens, one by one: LLaVA with a CLIP or DINOv2 tower.

Shape suffixes: B samples, L tokens, V vocabulary size, I images, N patches, H heads, D head dimension, K outliers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from medalign.config import StudentConfig
from medalign.contracts import Batch
from medalign.decoding.base import Decoding, setting
from medalign.decoding.contrast import Contrast, amplify, plausible
from medalign.errors import ConfigError
from medalign.student.families.base import ModelSpec
from medalign.student.model import Student


@dataclass(frozen=True)
class DAMRO(Contrast):
    """Contrast with the outlier tokens of the vision tower only."""

    name: ClassVar[str] = "damro"

    alpha: float = setting(2.0, "weight of the contrast", least=0, most=1000)
    beta: float = setting(0.1, "smallest probability of a token, relative to the most probable one", least=0, most=1)
    top: int = setting(10, "outlier tokens per image", least=1)
    tower_block: int = setting(-2, "block of the vision tower whose attention is read, from the end", most=-1)
    heads: Literal["joint", "mean"] = setting("joint", "attention over all channels at once, or the mean over heads")
    order: Literal["attention", "place"] = setting("attention", "order of the outlier tokens in the second view")

    def check(self, spec: ModelSpec, config: StudentConfig) -> None:
        """See `Method.check`."""
        try:
            spec.family.class_attention(spec, self.tower_block)
        except LookupError as reason:
            raise ConfigError(
                f"--decoding damro with tower_block {self.tower_block} needs a class token that attends to the image "
                f"tokens; this student is a {spec.family.model_type}, and {reason}; choose another method"
            ) from reason
        if self.top > spec.image.count:
            raise ConfigError(
                f"{self.option('top')} is {self.top}, but the student has only {spec.image.count} tokens per image"
            )

    @contextmanager
    def second_view(self, student: Student, batch: Batch, decoding: Decoding) -> Iterator[Batch]:
        """See `Contrast.second_view`."""
        outliers_IK = self.outliers(student, batch.student_pixels)
        rows_IK = batch.image_sample[:, None].expand_as(outliers_IK)
        starts_I1 = _first_tokens(batch)
        sources_IK, places_IK = starts_I1 + outliers_IK, starts_I1 + outliers_IK.sort(-1).values
        kept_BL = batch.image_index < 0
        kept_BL[rows_IK, places_IK] = True
        if self.order == "place":
            yield replace(batch, attention_mask=batch.attention_mask & kept_BL)
            return

        def reorder(_module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
            embeddings_BLD = kwargs["inputs_embeds"]
            if embeddings_BLD.shape[1] != kept_BL.shape[1]:  # a later pass, over a new token
                return None
            second, moved_BLD = len(kept_BL) + rows_IK, embeddings_BLD.clone()
            moved_BLD[second, places_IK] = embeddings_BLD[second, sources_IK]
            return args, kwargs | {"inputs_embeds": moved_BLD}

        hook = student.spec.language_model.register_forward_pre_hook(reorder, with_kwargs=True)
        try:
            yield replace(batch, attention_mask=batch.attention_mask & kept_BL)
        finally:
            hook.remove()

    def combine(self, first_BV: torch.Tensor, second_BV: torch.Tensor, step: int) -> torch.Tensor:
        """See `Contrast.combine`."""
        return plausible(amplify(first_BV, second_BV, self.alpha), first_BV, self.beta)

    @torch.no_grad()
    def outliers(self, student: Student, pixels: torch.Tensor) -> torch.Tensor:
        """Return the patches to which the class token attends most, [I, K], by falling attention."""
        query, key, heads = student.spec.family.class_attention(student.spec, self.tower_block)
        found: dict[nn.Module, torch.Tensor] = {}

        def keep(module: nn.Module, _inputs: Any, output: torch.Tensor) -> None:
            found[module] = output

        with ExitStack() as stack:
            for module in (query, key):
                stack.callback(module.register_forward_hook(keep).remove)
            student.spec.family.features(student.spec, pixels.to(student.dtype))
        heads = heads if self.heads == "mean" else 1
        query_IHD, key_INHD = (found[module].float().unflatten(-1, (heads, -1)) for module in (query, key))
        scores_IHN = torch.einsum("ihd,inhd->ihn", query_IHD[:, 0], key_INHD) * key_INHD.shape[-1] ** -0.5
        attention_IN: torch.Tensor = scores_IHN.softmax(-1).mean(1)[:, 1:]
        return attention_IN.topk(self.top, dim=-1).indices


def _first_tokens(batch: Batch) -> torch.Tensor:
    """Return the place of each image's first token in its row, [I, 1]."""
    images = torch.arange(len(batch.image_sample), device=batch.image_index.device)
    return (batch.image_index[batch.image_sample] == images[:, None]).int().argmax(-1, keepdim=True)
