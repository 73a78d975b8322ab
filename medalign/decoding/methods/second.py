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
chooses. The code selects again for each new token, so all prompts are read again; `reselect false` selects once, and
the passes over new tokens have caches. The code has other forms of the contrast, which its scripts do not use.

Each image of a sample is selected for itself. A sample without an image is decoded as usual.

Shape suffixes: B samples, L tokens, V vocabulary size, I images, N image tokens of a scale, G tokens per side at
the last scale, R samples that are read, T tokens of an answer so far.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F

from medalign.config import StudentConfig
from medalign.contracts import Batch
from medalign.decoding.base import Decoding, Method, Prepared, setting
from medalign.decoding.contrast import NO_BEAMS, map_tokens
from medalign.decoding.interventions import RecordedRow
from medalign.decoding.scales import Staged, look, stage
from medalign.errors import ConfigError
from medalign.student.capture import intervening
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
    reselect: bool = setting(True, "whether tokens are selected again for each new token; false: once, with caches")

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
        reader = _Reader(self, student, batch)
        ids_BT, running_B = batch.input_ids[:, :0], torch.ones_like(batch.input_ids[:, 0], dtype=torch.bool)
        while ids_BT.shape[1] < decoding.max_new_tokens and running_B.any():
            scores_BV = reader.scores(ids_BT, running_B)
            for process in processors:
                scores_BV = process(torch.cat([batch.input_ids, ids_BT], dim=1), scores_BV)
            token_B = scores_BV.argmax(-1).where(running_B, tokens["pad_token_id"])
            ids_BT = torch.cat([ids_BT, token_B[:, None]], dim=1)
            running_B = running_B & ~torch.isin(token_B, ends)
        return ids_BT, reader.attention_IN

    def combine(self, logits: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return the scores of the next token.

        Args:
            logits: [B, V] of each scale, from coarse to fine.
        """
        last_BV = logits[-1]
        weights = (self.alpha, self.beta, self.gamma)
        scores_BV = last_BV
        for weight, fine_BV, coarse_BV in zip(weights, logits[:0:-1], logits[-2::-1], strict=False):
            scores_BV = scores_BV + weight * (fine_BV - coarse_BV)
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


@dataclass
class _Prompts:
    """Prompts after the pass over one scale, for passes over new tokens."""

    cache: Any
    mask_BL: torch.Tensor
    gates: torch.Tensor | None  # of the query mixture


class _Reader:
    """Reads samples at all scales.

    Args:
        settings: the settings.
        student: the student.
        batch: questions, left-padded; at least one has an image.

    Attributes:
        attention_IN: the question's attention to the last scale's tokens in the first pass over them, 0 at those that
            are not read; None before.
    """

    def __init__(self, settings: SECOND, student: Student, batch: Batch) -> None:
        self._settings, self._student, self._batch = settings, student, batch
        self._scales = look(student, batch.student_pixels, settings.scales)
        self._prompts: list[_Prompts] = []  # of each scale
        self.attention_IN: torch.Tensor | None = None

    def scores(self, ids_BT: torch.Tensor, running_B: torch.Tensor) -> torch.Tensor:
        """Return the scores of the next token, [B, V]; zeros for a sample that has ended and is not read again.

        Args:
            ids_BT: tokens of the answers so far.
            running_B: False for a sample that has ended.
        """
        has_image_B1 = (self._batch.image_index >= 0).any(1, keepdim=True)
        if self._prompts and not self._settings.reselect:
            logits = [self._continue(prompts, ids_BT[:, -1:]) for prompts in self._prompts]
            return self._settings.combine(logits).where(has_image_B1, logits[-1])
        rows = running_B.nonzero().flatten()
        logits = self._read(_with_answers(self._batch, ids_BT), rows.tolist())
        scores_RV = self._settings.combine(logits).where(has_image_B1[rows], logits[-1])
        return scores_RV.new_zeros(len(ids_BT), scores_RV.shape[1]).index_copy(0, rows, scores_RV)

    def _read(self, batch: Batch, rows: list[int]) -> list[torch.Tensor]:
        """Read the prompts of samples at one scale after another. Returns the logits [R, V] of each."""
        attentions, side = self._student.spec.attentions, self._scales[-1].side
        masks = [torch.ones(len(batch.image_sample), side, side, dtype=torch.bool, device=batch.input_ids.device)]
        logits: list[torch.Tensor] = []
        self._prompts = []
        for number, scale in enumerate(self._scales):
            steps = [side // each.side for each in self._scales[: number + 1]]
            chosen = [mask[:, ::step, ::step].flatten(1) for mask, step in zip(masks, steps, strict=True)]
            staged = stage(batch, rows, self._scales, chosen)
            records = {} if scale is self._scales[-1] else {attention: RecordedRow() for attention in attentions}
            with intervening(records):
                logits.append(self._pass(staged))
            if records:
                weights_RL = _last_row(records.values(), staged.batch.attention_mask)
                masks.append(self._settings.select(self._add_maps(staged, weights_RL, masks)))
        return logits

    def _pass(self, staged: Staged) -> torch.Tensor:
        """Read prompts at one scale, and remember what is needed later. Returns the logits, [R, V]."""
        student, last = self._student, self._scales[-1]
        output, map_RL = student.read(staged.batch, staged.features_TD, use_cache=not self._settings.reselect)
        logits_RV: torch.Tensor = output.logits[:, -1].float()
        gates = None if student.mixture is None else student.mixture.decided
        self._prompts.append(_Prompts(output.past_key_values, staged.batch.attention_mask, gates))
        if self.attention_IN is None and len(self._prompts) == len(self._scales):
            self.attention_IN = torch.zeros(last.features_IND.shape[:2], device=map_RL.device)
            for piece, weights in staged.split(map_RL):
                if piece.scale == len(self._scales) - 1:
                    self.attention_IN[piece.image, piece.tokens] = weights
        return logits_RV

    def _continue(self, prompts: _Prompts, token_B1: torch.Tensor) -> torch.Tensor:
        """Return the logits [B, V] after one more token at one scale."""
        student = self._student
        prompts.mask_BL = F.pad(prompts.mask_BL, (0, 1), value=True)
        if student.mixture is not None:
            student.mixture.decided = prompts.gates
        output = student.model(
            input_ids=token_B1,
            attention_mask=prompts.mask_BL.long(),
            position_ids=prompts.mask_BL.sum(1, keepdim=True) - 1,
            past_key_values=prompts.cache,
            use_cache=True,
        )
        logits_BV: torch.Tensor = output.logits[:, -1].float()
        return logits_BV

    def _add_maps(self, staged: Staged, weights_RL: torch.Tensor, masks: list[torch.Tensor]) -> torch.Tensor:
        """Return the sum of the maps of the scales that were read, [I, G, G].

        Args:
            staged: the prompts.
            weights_RL: attention of each prompt's last token.
            masks: where the tokens of each scale are read, [I, G, G].
        """
        sum_IGG = torch.zeros(masks[0].shape, device=weights_RL.device)
        for (image, number, tokens), weights in staged.split(weights_RL):
            scale = self._scales[number]
            assert scale.attention_INN is not None
            if not weights.any():
                raise _unseen(self._student.spec)
            map_N = weights / weights.sum() @ scale.attention_INN[image, tokens]
            map_YX = (map_N / map_N.max()).unflatten(0, (scale.side, scale.side))
            step = len(sum_IGG[0]) // scale.side
            map_GG = map_YX.repeat_interleave(step, 0).repeat_interleave(step, 1)
            sum_IGG[image] += 4**number * map_GG * masks[number][image]
        return sum_IGG


def _unseen(spec: ModelSpec) -> ConfigError:
    covered = max((spec.window(block) or 0 for block in range(len(spec.blocks))), default=0)
    return ConfigError(
        "--decoding second reads the attention of the prompt's last token to the image, and a prompt is so long that "
        f"no block covers its image ({covered} tokens at most); choose another method"
    )


def _last_row(rows: Iterable[RecordedRow], mask_RL: torch.Tensor) -> torch.Tensor:
    """Return the attention of each prompt's last token, [R, L], as the method defines it for all scales together."""
    first_R1 = mask_RL.int().argmax(-1, keepdim=True)
    parts = [row.weights_RHK.mean(1).scatter(1, first_R1, 0) for row in rows if row.weights_RHK is not None]
    return torch.stack([part / part.sum(-1, keepdim=True) for part in parts]).mean(0)


def _with_answers(batch: Batch, ids_BT: torch.Tensor) -> Batch:
    """Return prompts with the answers so far at their end."""
    count = ids_BT.shape[1]
    return replace(
        map_tokens(batch, lambda values_BL, fill: F.pad(values_BL, (0, count), value=fill)),
        input_ids=torch.cat([batch.input_ids, ids_BT], dim=1),
        attention_mask=F.pad(batch.attention_mask, (0, count), value=True),
    )
