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

The views differ only in the text after the image, so the second one reads only this text of the prompts. The keys and
values of all else are those of the first view.

Shape suffixes: B samples, R samples of the views in a pass, H query heads, G key heads, L tokens of the prompts,
Q rows of a pass, T last rows of a pass, which contain all of its text, K keys, D head dimension, F frequencies,
V vocabulary size.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn import functional as F

from medalign.config import StudentConfig
from medalign.contracts import Batch
from medalign.decoding.base import Decoding, Method, Prepared, setting
from medalign.decoding.contrast import NO_BEAMS, TwoViews, amplify, plausible
from medalign.errors import ConfigError
from medalign.student.capture import Output, intervening
from medalign.student.families.base import ModelSpec
from medalign.student.model import Student
from medalign.student.query_mixture import QueryMixture
from medalign.student.views import Arguments, Forward, read_rest


@dataclass(frozen=True)
class IMCCD(Method):
    """Contrast with distorted values, with refined attention to the image in both views."""

    name: ClassVar[str] = "imccd"
    beams: ClassVar[str] = NO_BEAMS

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
        image_BL = batch.image_index >= 0
        if not image_BL.any():
            yield Prepared(batch)
            return
        prompts = _Prompts.of(batch, student)
        calibrated: dict[nn.Module, Any] = {
            attention: _Calibration(prompts, self.gamma if block < self.refined_blocks else 0.0)
            for block, attention in enumerate(student.spec.attentions)
        }
        contrast = TwoViews(self.combine, image_BL.any(1), batch.input_ids.shape[1])
        with intervening(calibrated):
            yield Prepared(batch, (contrast,), (prompts.read_first, prompts.read_second))

    def combine(self, first_BV: torch.Tensor, second_BV: torch.Tensor, step: int) -> torch.Tensor:
        """Return the scores of the next token, as `Contrast.combine`."""
        return plausible(amplify(first_BV, second_BV, self.alpha), first_BV, self.beta)


class _Reading(Enum):
    """What the current pass reads."""

    FIRST = auto()  # the prompts in the first view
    SECOND = auto()  # the text of the prompts in the second view
    BOTH = auto()  # new tokens of both views: R = 2 B


@dataclass
class _Prompts:
    """What the blocks need to know of the prompts, and how their views are read."""

    valid_BL: torch.Tensor  # False at padding
    image_BL: torch.Tensor  # True at image tokens
    text_BL: torch.Tensor  # True after the last image of a sample that has one
    question_BL: torch.Tensor  # True at tokens of the question
    cos_BLD: torch.Tensor  # of the rotation from a token of an image to its last one
    sin_BLD: torch.Tensor
    mixture: QueryMixture | None
    reading: _Reading = _Reading.BOTH
    first: Any = None  # cache of the first view, while the second one is read

    @classmethod
    def of(cls, batch: Batch, student: Student) -> _Prompts:
        """Read a batch."""
        language: Any = student.spec.language_model
        index_BL = batch.image_index
        image_BL = index_BL >= 0
        places_BL = torch.arange(index_BL.shape[1], device=index_BL.device).expand_as(index_BL)
        last_I = index_BL.new_zeros(len(batch.image_sample))
        last_I.scatter_reduce_(0, index_BL[image_BL], places_BL[image_BL], "amax")
        distance_BL = (last_I[index_BL.clamp_min(0)] - places_BL) * image_BL
        angle_BLF = distance_BL[..., None] * language.rotary_emb.inv_freq.float()
        angle_BLD = torch.cat([angle_BLF, angle_BLF], dim=-1)
        text_BL = (image_BL.flip(1).cumsum(1).flip(1) == 0) & image_BL.any(1, keepdim=True)
        rotation = angle_BLD.cos(), angle_BLD.sin()
        return cls(batch.attention_mask, image_BL, text_BL, batch.question_mask, *rotation, student.mixture)

    def start(self) -> int:
        """Return how many tokens the second view does not read: all before the text of the longest one.

        A mixture decides by the last token of the question, which must be read, too. What a sample without an image is
        left with does not matter: it has no second view.
        """
        read_BL = self.text_BL
        if self.mixture is not None:
            read_BL = read_BL | (self.question_BL & (self.question_BL.flip(1).cumsum(1).flip(1) == 1))
        return int(read_BL.any(0).int().argmax())

    def read_first(self, forward: Forward, arguments: Arguments) -> Any:
        """Read the first view."""
        self.reading = _Reading.FIRST
        found = forward(**arguments)
        self.first = arguments["past_key_values"]
        return found

    def read_second(self, forward: Forward, arguments: Arguments) -> Any:
        """Read what differs in the second view."""
        self.reading, start = _Reading.SECOND, self.start()
        if self.mixture is not None:
            self.mixture.begin(self.question_BL[:, start:], valid_BL=self.valid_BL[:, start:])
        found = read_rest(forward, arguments, self.first, self.text_BL, start)
        if self.mixture is not None:
            decided = self.mixture.decided
            self.mixture.begin(self.question_BL, valid_BL=self.valid_BL)
            self.mixture.decided = decided
        self.reading, self.first = _Reading.BOTH, None
        return found


class _Calibration:
    """The attention of one block.

    Args:
        prompts: of all samples.
        gamma: see `IMCCD`.
    """

    def __init__(self, prompts: _Prompts, gamma: float) -> None:
        self._prompts, self._gamma = prompts, gamma
        self._text = int(prompts.text_BL.sum(1).max())  # tokens of the longest text after an image
        self._all_text = bool(prompts.text_BL.any(1).all())
        self._first: tuple[torch.Tensor, torch.Tensor] | None = None  # keys and values of the first view
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
        reading, rows, keys = self._prompts.reading, query_RHQD.shape[2], key_RGKD.shape[2]
        new = keys - self._prompts.text_BL.shape[1]  # tokens of the answer so far
        if reading is _Reading.FIRST:
            self._read_prompts(key_RGKD, value_RGKD, query_RHQD.shape[1])
            if self._gamma == 0:
                unchanged: Output = attend(module, query_RHQD, key_RGKD, value_RGKD, attention_mask, **kwargs)
                return unchanged
        elif reading is _Reading.SECOND:
            key_RGKD, value_RGKD = self._as_first_but_for_text(key_RGKD, value_RGKD)
        text_RL = self._of_rows(self._prompts.text_BL)
        text_RK = F.pad(text_RL, (0, new), value=True) & text_RL.any(1, keepdim=True)
        tail = min(rows, self._text + new)
        text_RT = text_RK[:, keys - tail :]
        mixed_RTHD = self._mix(query_RHQD[:, :, -tail:], key_RGKD, value_RGKD, text_RT, kwargs["scaling"])
        if new and self._all_text:
            output_RQHD = mixed_RTHD
        else:
            output_RQHD, _ = attend(module, query_RHQD, key_RGKD, value_RGKD, attention_mask, **kwargs)
            output_RQHD[:, -tail:] = mixed_RTHD.where(text_RT[..., None, None], output_RQHD[:, -tail:])
        if reading is _Reading.SECOND:  # from now on, passes have the rows of both views
            if self._gamma > 0:
                self._moved_RGLD = self._moved_RGLD.repeat(2, 1, 1, 1)
            self._constant_RH11 = self._constant_RH11.repeat(2, 1, 1, 1)
        return output_RQHD, None

    def _of_rows(self, values_BL: torch.Tensor) -> torch.Tensor:
        """Return what belongs to the rows of this pass."""
        return values_BL.repeat(2, 1) if self._prompts.reading is _Reading.BOTH else values_BL

    def _read_prompts(self, key_BGLD: torch.Tensor, value_BGLD: torch.Tensor, heads: int) -> None:
        """Prepare what both views need; their images are the same."""
        image_BL, half = self._prompts.image_BL, key_BGLD.shape[-1] // 2
        self._first = key_BGLD, value_BGLD
        if self._gamma > 0:
            turned_BGLD = torch.cat([-key_BGLD[..., half:], key_BGLD[..., :half]], dim=-1).float()
            cos_B1LD, sin_B1LD = self._prompts.cos_BLD[:, None], self._prompts.sin_BLD[:, None]
            self._moved_RGLD = (key_BGLD.float() * cos_B1LD + turned_BGLD * sin_B1LD).to(key_BGLD.dtype)
        means_BGL = value_BGLD.float().mean(-1).where(image_BL[:, None], 0)
        constant_BG = means_BGL.sum(-1) / image_BL.sum(1, keepdim=True).clamp_min(1)
        self._constant_RH11 = constant_BG.repeat_interleave(heads // constant_BG.shape[1], 1)[..., None, None]

    def _as_first_but_for_text(
        self, key_BGLD: torch.Tensor, value_BGLD: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the keys and values of the second view, and forget those of the first one."""
        assert self._first is not None
        first_key_BGLD, first_value_BGLD = self._first
        self._first = None
        text_B1L1 = self._prompts.text_BL[:, None, :, None]
        return key_BGLD.where(text_B1L1, first_key_BGLD), value_BGLD.where(text_B1L1, first_value_BGLD)

    def _mix(
        self,
        query_RHTD: torch.Tensor,
        key_RGKD: torch.Tensor,
        value_RGKD: torch.Tensor,
        text_RT: torch.Tensor,
        scaling: float,
    ) -> torch.Tensor:
        """Return the outputs of the last T rows, [R, T, H, D]."""
        new = key_RGKD.shape[2] - self._prompts.text_BL.shape[1]
        image_RK = F.pad(self._of_rows(self._prompts.image_BL), (0, new))
        scores_RHTK = self._scores(query_RHTD, key_RGKD, image_RK) * scaling
        weights_RHTK = scores_RHTK.masked_fill(~self._seen(text_RT, new), -torch.inf).softmax(-1)
        if self._prompts.reading is _Reading.FIRST:
            return _grouped(weights_RHTK.to(value_RGKD.dtype), value_RGKD).to(value_RGKD.dtype).transpose(1, 2)
        pairs_R1TK = (text_RT[:, :, None] & image_RK[:, None])[:, None]
        count_R = pairs_R1TK.sum((1, 2, 3)) * scores_RHTK.shape[1]
        mean_R111 = (scores_RHTK * pairs_R1TK).sum((1, 2, 3), keepdim=True) / count_R[:, None, None, None]
        distorted_RHTK = pairs_R1TK & (scores_RHTK > mean_R111)
        if self._prompts.reading is _Reading.BOTH:
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
        valid_RK = F.pad(self._of_rows(self._prompts.valid_BL), (0, new), value=True)
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
