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
        text_RK = F.pad(self._views.text_RL, (0, new), value=True) & self._views.text_RL.any(1, keepdim=True)
        tail = min(rows, self._tail + new)
        text_RT = text_RK[:, keys - tail :]
        mixed_RTHD = self._mix(query_RHQD[:, :, -tail:], key_RGKD, value_RGKD, text_RT, **kwargs)
        output_RQHD, _ = attend(module, query_RHQD, key_RGKD, value_RGKD, attention_mask, **kwargs)
        output_RQHD[:, -tail:] = mixed_RTHD.where(text_RT[..., None, None], output_RQHD[:, -tail:])
        return output_RQHD, None

    def _mix(
        self,
        query_RHTD: torch.Tensor,
        key_RGKD: torch.Tensor,
        value_RGKD: torch.Tensor,
        text_RT: torch.Tensor,
        *,
        scaling: float,
        **_: Any,
    ) -> torch.Tensor:
        """Return the outputs of the last T rows, [R, T, H, D]."""
        new, groups = key_RGKD.shape[2] - self._views.text_RL.shape[1], query_RHTD.shape[1] // key_RGKD.shape[1]
        image_RK = F.pad(self._views.image_RL, (0, new))
        key_RHKD, value_RHKD = (part.repeat_interleave(groups, 1) for part in (key_RGKD, value_RGKD))
        scores_RHTK = self._scores(query_RHTD, key_RHKD, image_RK) * scaling
        weights_RHTK = scores_RHTK.masked_fill(~self._seen(text_RT, new), -torch.inf).softmax(-1)
        image_R11K, pairs_R1TK = image_RK[:, None, None], (text_RT[:, :, None] & image_RK[:, None])[:, None]
        count_R = pairs_R1TK.sum((1, 2, 3)) * scores_RHTK.shape[1]
        mean_R = scores_RHTK.where(pairs_R1TK, 0).sum((1, 2, 3)) / count_R
        distorted_RHTK = image_R11K & (scores_RHTK > mean_R[:, None, None, None])
        distorted_RHTK[: len(image_RK) // 2] = False  # the first view
        value_RHK1 = value_RHKD.float().mean(-1, keepdim=True).where(image_RK[:, None, :, None], 0)
        constant_RH11 = value_RHK1.sum(2, keepdim=True) / image_RK.sum(1).clamp_min(1)[:, None, None, None]
        kept_RHTD = weights_RHTK.masked_fill(distorted_RHTK, 0) @ value_RHKD.float()
        lost_RHT1 = weights_RHTK.where(distorted_RHTK, 0).sum(-1, keepdim=True)
        return (kept_RHTD + lost_RHT1 * constant_RH11).to(value_RGKD.dtype).transpose(1, 2)

    def _scores(self, query_RHTD: torch.Tensor, key_RHKD: torch.Tensor, image_RK: torch.Tensor) -> torch.Tensor:
        """Return the scores without their scale, refined at the image."""
        query_RHTD, key_RHKD = query_RHTD.float(), key_RHKD.float()
        scores_RHTK = query_RHTD @ key_RHKD.transpose(2, 3)
        if self._gamma == 0:
            return scores_RHTK
        prompt_RHLD = key_RHKD[:, :, : self._views.text_RL.shape[1]]
        half = prompt_RHLD.shape[-1] // 2
        turned_RHLD = torch.cat([-prompt_RHLD[..., half:], prompt_RHLD[..., :half]], dim=-1)
        moved_RHLD = prompt_RHLD * self._views.cos_RLD[:, None] + turned_RHLD * self._views.sin_RLD[:, None]
        near_RHTK = F.pad(query_RHTD @ moved_RHLD.transpose(2, 3), (0, key_RHKD.shape[2] - prompt_RHLD.shape[2]))
        return torch.lerp(scores_RHTK, near_RHTK.where(image_RK[:, None, None], scores_RHTK), self._gamma)

    def _seen(self, text_RT: torch.Tensor, new: int) -> torch.Tensor:
        """Return which keys a row may see, [R, 1, T, K]. Rows that are not text see all, since they are not used."""
        valid_RK = F.pad(self._views.valid_RL, (0, new), value=True)
        keys, rows = valid_RK.shape[1], text_RT.shape[1]
        places_K = torch.arange(keys, device=text_RT.device)
        causal_TK = places_K[None] <= places_K[keys - rows :, None]
        return ((causal_TK & valid_RK[:, None]) | ~text_RT[..., None])[:, None]
