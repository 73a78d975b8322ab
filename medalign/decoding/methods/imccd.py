"""IMCCD: Inter-Modality Correlation Calibration Decoding (Li et al., arXiv 2501.01926).

    logits = (1 + alpha) l - alpha l'                   l': the view with distorted values
    plausible tokens: p >= beta max p

Two changes of the attention of text after the image to image tokens, A being the scores before the softmax:

- Both views, in the first `refined_blocks` blocks: A becomes (1 - gamma) A + gamma A'. A' are the scores that a text
  token would have if all image tokens were at the place of the last one, just before the text.
- The second view, in every block: weights whose score is above the mean of A, over the heads, the text and the image
  tokens, act on a constant in place of the value: the mean of the head's values over image tokens and channels.

Source: the authors' code (github.com/lijm48/IMCCD), since the paper's text is less exact. The defaults are those of the
authors' script for POPE with LLaVA: alpha 3, beta 0.2, gamma 0.2, 6 blocks. For captions their script has alpha 1 and
beta 0.3. The authors sample from the contrast; here that is `do_sample`. They have one image per sample; of several,
the text is what follows the last one here, and each image is at the place of its own last token.

Refused are students whose positions are not one rotation per token (Qwen-VL) and those with windows (Gemma 3).

Shape suffixes: R rows of both views, H query heads, G key heads, L tokens of the prompts, Q rows of a pass, T last rows
of a pass, which contain all of its text, K keys, D head dimension, F frequencies, V vocabulary size.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn import functional as F

from medalign.config import StudentConfig
from medalign.contracts import Batch
from medalign.decoding.base import Decoding, Prepared, setting
from medalign.decoding.contrast import Contrast, amplify, plausible
from medalign.errors import ConfigError
from medalign.student.capture import Output, intervening
from medalign.student.families.base import ModelSpec
from medalign.student.model import Student


@dataclass(frozen=True)
class IMCCD(Contrast):
    """Contrast with distorted values, with refined attention to the image in both views."""

    name: ClassVar[str] = "imccd"

    alpha: float = setting(3.0, "weight of the contrast", least=0, most=1000)
    beta: float = setting(0.2, "smallest probability of a token, relative to the most probable one", least=0, most=1)
    gamma: float = setting(0.2, "share of the scores without the distance to the image", least=0, most=1)
    refined_blocks: int = setting(6, "blocks, from the first, whose attention to the image is refined", least=0)

    def check(self, spec: ModelSpec, config: StudentConfig) -> None:
        """See `Method.check`."""
        language: Any = spec.language_model
        text, rotary = language.config, getattr(language, "rotary_emb", None)
        frequencies = getattr(rotary, "inv_freq", ())
        whole = 2 * len(frequencies) == spec.attentions[0].head_dim and getattr(rotary, "attention_scaling", 0) == 1
        several = "mrope_section" in (text.rope_parameters or {})
        windows = any(spec.window(block) for block in range(len(spec.blocks)))
        if not whole or several or windows or getattr(text, "attn_logit_softcapping", None):
            raise ConfigError(
                "--decoding imccd needs a student with one rotation per token, in all channels, and attention to all "
                f"tokens, which this one ({spec.family.model_type}, {text.model_type}) does not have; choose another "
                "method"
            )

    @contextmanager
    def applied(self, student: Student, batch: Batch, decoding: Decoding) -> Iterator[Prepared]:
        """See `Method.applied`."""
        with super().applied(student, batch, decoding) as prepared:
            if prepared.batch is batch:  # no sample has an image
                yield prepared
                return
            view = _Views.of(prepared.batch, student.spec)
            calibrated: dict[nn.Module, Any] = {
                attention: _Calibration(view, self.gamma if block < self.refined_blocks else 0.0)
                for block, attention in enumerate(student.spec.attentions)
            }
            with intervening(calibrated):
                yield prepared

    @contextmanager
    def second_view(self, student: Student, batch: Batch, decoding: Decoding) -> Iterator[Batch]:
        """Yield the same samples: the views differ in what the blocks do with them."""
        yield batch

    def combine(self, first_BV: torch.Tensor, second_BV: torch.Tensor, step: int) -> torch.Tensor:
        """See `Contrast.combine`."""
        return plausible(amplify(first_BV, second_BV, self.alpha), first_BV, self.beta)


@dataclass(frozen=True)
class _Views:
    """What the blocks need to know of the prompts of both views."""

    valid_RL: torch.Tensor  # False at padding
    image_RL: torch.Tensor  # True at image tokens
    text_RL: torch.Tensor  # True after the last image of a sample that has one
    cos_RLD: torch.Tensor  # of the rotation from a token of an image to its last one
    sin_RLD: torch.Tensor

    @classmethod
    def of(cls, batch: Batch, spec: ModelSpec) -> _Views:
        """Read a batch of both views."""
        language: Any = spec.language_model
        index_RL = batch.image_index
        image_RL = index_RL >= 0
        places_RL = torch.arange(index_RL.shape[1], device=index_RL.device).expand_as(index_RL)
        last_I = index_RL.new_zeros(len(batch.image_sample))
        last_I.scatter_reduce_(0, index_RL[image_RL], places_RL[image_RL], "amax")
        distance_RL = (last_I[index_RL.clamp_min(0)] - places_RL) * image_RL
        angle_RLF = distance_RL[..., None] * language.rotary_emb.inv_freq.float()
        angle_RLD = torch.cat([angle_RLF, angle_RLF], dim=-1)
        after_RL = image_RL.flip(1).cumsum(1).flip(1) == 0
        text_RL = after_RL & image_RL.any(1, keepdim=True)
        return cls(batch.attention_mask, image_RL, text_RL, angle_RLD.cos(), angle_RLD.sin())


class _Calibration:
    """The attention of one block.

    Args:
        views: of the prompts.
        gamma: see `IMCCD`.
    """

    def __init__(self, views: _Views, gamma: float) -> None:
        self._views, self._gamma = views, gamma
        self._tail = int(views.text_RL.sum(1).max())  # text tokens after the image, of the longest sample
        self._all_text = bool(views.text_RL.any(1).all())
        self._moved_RGLD = torch.empty(0)  # keys of the prompts, as if image tokens were at the last one's place
        self._constant_RH11 = torch.empty(0)  # in place of distorted values

    def __call__(
        self,
        attend: Any,
        module: nn.Module,
        query_RHQD: torch.Tensor,
        key_RGKD: torch.Tensor,
        value_RGKD: torch.Tensor,
        attention_mask: torch.Tensor | None,
        /,
        **kwargs: Any,
    ) -> Output:
        """Compute the rows of text after the image here, and the others by the backend."""
        rows, keys = query_RHQD.shape[2], key_RGKD.shape[2]
        new = keys - self._views.text_RL.shape[1]  # tokens of the answer so far
        if new == 0:
            self._read_prompts(key_RGKD, value_RGKD, query_RHQD.shape[1])
        text_RK = F.pad(self._views.text_RL, (0, new), value=True) & self._views.text_RL.any(1, keepdim=True)
        tail = min(rows, self._tail + new)
        text_RT = text_RK[:, keys - tail :]
        mixed_RTHD = self._mix(query_RHQD[:, :, -tail:], key_RGKD, value_RGKD, text_RT, kwargs["scaling"])
        if tail == rows and self._all_text:
            return mixed_RTHD, None
        output_RQHD, _ = attend(module, query_RHQD, key_RGKD, value_RGKD, attention_mask, **kwargs)
        output_RQHD[:, -tail:] = mixed_RTHD.where(text_RT[..., None, None], output_RQHD[:, -tail:])
        return output_RQHD, None

    def _read_prompts(self, key_RGLD: torch.Tensor, value_RGLD: torch.Tensor, heads: int) -> None:
        image_RL, half = self._views.image_RL, key_RGLD.shape[-1] // 2
        turned_RGLD = torch.cat([-key_RGLD[..., half:], key_RGLD[..., :half]], dim=-1).float()
        moved_RGLD = key_RGLD.float() * self._views.cos_RLD[:, None] + turned_RGLD * self._views.sin_RLD[:, None]
        self._moved_RGLD = moved_RGLD.to(key_RGLD.dtype)
        means_RGL = value_RGLD.float().mean(-1).where(image_RL[:, None], 0)
        constant_RG = means_RGL.sum(-1) / image_RL.sum(1, keepdim=True).clamp_min(1)
        self._constant_RH11 = constant_RG.repeat_interleave(heads // constant_RG.shape[1], 1)[..., None, None]

    def _mix(
        self,
        query_RHTD: torch.Tensor,
        key_RGKD: torch.Tensor,
        value_RGKD: torch.Tensor,
        text_RT: torch.Tensor,
        scaling: float,
    ) -> torch.Tensor:
        """Return the outputs of the last T rows, [R, T, H, D]."""
        new = key_RGKD.shape[2] - self._views.text_RL.shape[1]
        image_RK = F.pad(self._views.image_RL, (0, new))
        scores_RHTK = self._scores(query_RHTD, key_RGKD, image_RK) * scaling
        weights_RHTK = scores_RHTK.masked_fill(~self._seen(text_RT, new), -torch.inf).softmax(-1)
        pairs_R1TK = (text_RT[:, :, None] & image_RK[:, None])[:, None]
        count_R = pairs_R1TK.sum((1, 2, 3)) * scores_RHTK.shape[1]
        mean_R111 = (scores_RHTK * pairs_R1TK).sum((1, 2, 3), keepdim=True) / count_R[:, None, None, None]
        distorted_RHTK = pairs_R1TK & (scores_RHTK > mean_R111)
        distorted_RHTK[: len(image_RK) // 2] = False  # the first view
        kept_RHTK = weights_RHTK.masked_fill(distorted_RHTK, 0)
        lost_RHT1 = (weights_RHTK - kept_RHTK).sum(-1, keepdim=True)
        mixed_RHTD = _grouped(kept_RHTK.to(value_RGKD.dtype), value_RGKD) + lost_RHT1 * self._constant_RH11
        return mixed_RHTD.to(value_RGKD.dtype).transpose(1, 2)

    def _scores(self, query_RHTD: torch.Tensor, key_RGKD: torch.Tensor, image_RK: torch.Tensor) -> torch.Tensor:
        """Return the scores without their scale, refined at the image."""
        scores_RHTK = _grouped(query_RHTD, key_RGKD.transpose(2, 3))
        if self._gamma == 0:
            return scores_RHTK
        near_RHTL = _grouped(query_RHTD, self._moved_RGLD.transpose(2, 3))
        near_RHTK = F.pad(near_RHTL, (0, scores_RHTK.shape[-1] - near_RHTL.shape[-1]))
        return torch.lerp(scores_RHTK, near_RHTK.where(image_RK[:, None, None], scores_RHTK), self._gamma)

    def _seen(self, text_RT: torch.Tensor, new: int) -> torch.Tensor:
        """Return which keys a row may see, [R, 1, T, K]. Rows that are not text see all, since they are not used."""
        valid_RK = F.pad(self._views.valid_RL, (0, new), value=True)
        keys, rows = valid_RK.shape[1], text_RT.shape[1]
        places_K = torch.arange(keys, device=text_RT.device)
        causal_TK = places_K[None] <= places_K[keys - rows :, None]
        return ((causal_TK & valid_RK[:, None]) | ~text_RT[..., None])[:, None]


def _grouped(first_RHTX: torch.Tensor, second_RGXY: torch.Tensor) -> torch.Tensor:
    """Multiply the matrices of each head with those of its group, [R, H, T, Y] in float32."""
    groups, rows = second_RGXY.shape[1], first_RHTX.shape[2]
    joined_RGMX = first_RHTX.unflatten(1, (groups, -1)).flatten(2, 3)
    product_RGMY = torch.matmul(joined_RGMX, second_RGXY).float()
    product_RHTY: torch.Tensor = product_RGMY.unflatten(2, (-1, rows)).flatten(1, 2)
    return product_RHTY
