"""Reads samples at several scales of their images, for `methods.second`.

The prompts of all scales are rows of one cache, so a new token takes one pass. Which tokens of a scale are read depends
on the attention of the last token, so it may change with each new token. The prompts of a sample for which it does are
read again from that scale on; keys and values of all others remain what they would be if they were read again.

Shape suffixes: S scales, B samples, U = S B rows of the cache, R rows that are read, L tokens, V vocabulary size,
I images, J some of them, N image tokens of a scale, G tokens per side at the last scale, T tokens of an answer so far.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F

from medalign.contracts import Batch
from medalign.decoding.contrast import map_tokens
from medalign.decoding.interventions import RecordedRow
from medalign.decoding.scales import Piece, Staged, look, stage
from medalign.errors import ConfigError
from medalign.student.capture import intervening
from medalign.student.families.base import ModelSpec
from medalign.student.model import Student

Select = Callable[[torch.Tensor], torch.Tensor]
"""Takes sums of maps [J, G, G]; returns where tokens of the next scale are read, bool [J, G, G]."""


class ScaleReader:
    """Reads samples at all scales.

    Args:
        student: the student.
        batch: questions, left-padded; at least one has an image.
        count: number of scales.
        select: selects tokens.
        reselect: whether they are selected again for each new token.

    Attributes:
        attention_IN: the question's attention to the last scale's tokens in the first pass over them, 0 at those that
            are not read; None before.
    """

    def __init__(self, student: Student, batch: Batch, count: int, select: Select, reselect: bool) -> None:
        self._student, self._batch, self._select, self._reselect = student, batch, select, reselect
        self._scales = look(student, batch.student_pixels, count)
        self._samples, side = len(batch.input_ids), self._scales[-1].side
        grids = (count, len(batch.image_sample), side, side)
        self._read_SIGG = torch.ones(grids, dtype=torch.bool, device=batch.input_ids.device)
        # Of each scale's prompts, where the tokens of the scales up to it are, [I, N] each: places counted back from
        # the end of the prompt, since padding on the left changes; 0 for tokens that are not read.
        self._back = [
            [torch.zeros(each.features_IND.shape[:2], dtype=torch.long, device=batch.input_ids.device) for each in part]
            for part in (self._scales[: scale + 1] for scale in range(count))
        ]
        self._sample_of = batch.image_sample.tolist()
        self._cache = _JoinedCache(count * self._samples)
        self._logits_SBV: torch.Tensor | None = None
        self.attention_IN: torch.Tensor | None = None

    def logits(self, ids_BT: torch.Tensor, running_B: torch.Tensor) -> torch.Tensor:
        """Return the logits of the next token at each scale, [S, B, V].

        Args:
            ids_BT: tokens of the answers so far; none in the first call, and one more in each following one.
            running_B: False for a sample that has ended, whose logits are of no use.
        """
        if self._logits_SBV is None:
            self._read(ids_BT, range(self._samples), 0)
        else:
            attention_UL = self._continue(ids_BT)
            if attention_UL is not None:
                for scale, samples in self._changes(attention_UL, running_B.tolist(), ids_BT.shape[1]).items():
                    self._read(ids_BT, samples, scale)
        assert self._logits_SBV is not None
        return self._logits_SBV

    def _read(self, ids_BT: torch.Tensor, rows: Sequence[int], first: int) -> None:
        """Read prompts with their answers so far at one scale after another, from the scale `first` on."""
        student, answered, last = self._student, ids_BT.shape[1], len(self._scales) - 1
        batch = _with_answers(self._batch, ids_BT)
        for scale in range(first, last + 1):
            steps = [len(self._read_SIGG[0, 0]) // each.side for each in self._scales[: scale + 1]]
            chosen = [mask[:, ::step, ::step].flatten(1) for mask, step in zip(self._read_SIGG, steps, strict=False)]
            staged = stage(batch, rows, self._scales, chosen)
            records = {} if scale == last else {attention: RecordedRow() for attention in student.spec.attentions}
            with intervening(records):
                output, map_RL = student.read(staged.batch, staged.features_TD, use_cache=True)
            units, mask_RL = [scale * self._samples + row for row in rows], staged.batch.attention_mask
            gates = None if student.mixture is None else student.mixture.decided
            self._cache.put(units, output.past_key_values, mask_RL, gates)
            self._keep_logits(scale, rows, output.logits[:, -1].float())
            self._keep_places(scale, staged, answered)
            if scale == last:
                self._keep_attention(staged.split(map_RL))
            else:
                images = [image for image, sample in enumerate(self._sample_of) if sample in rows]
                places = [rows.index(self._sample_of[image]) for image in images]
                attention_JL = _last_row(records.values(), mask_RL)[places]
                self._read_SIGG[scale + 1, images] = self._next_scale(scale, images, attention_JL, answered)

    def _continue(self, ids_BT: torch.Tensor) -> torch.Tensor | None:
        """Read one more token of all samples at all scales. Returns its attention [U, L], None if nothing needs it."""
        student, mask_UL = self._student, self._cache.extend()
        if student.mixture is not None:
            student.mixture.decided = self._cache.gates
        attentions = student.spec.attentions if self._reselect else []
        records = {attention: RecordedRow() for attention in attentions}
        with intervening(records):
            output = student.model(
                input_ids=ids_BT[:, -1:].repeat(len(self._scales), 1),
                attention_mask=mask_UL.long(),
                position_ids=mask_UL.sum(1, keepdim=True) - 1,
                past_key_values=self._cache.cache,
                use_cache=True,
            )
        self._logits_SBV = output.logits[:, -1].float().unflatten(0, (len(self._scales), -1))
        return _last_row(records.values(), mask_UL) if records else None

    def _changes(self, attention_UL: torch.Tensor, running: Sequence[bool], answered: int) -> dict[int, list[int]]:
        """Select tokens again. Returns, by the first scale of which others are read now, the running samples."""
        found: dict[int, list[int]] = {}
        images: list[int] | slice = [image for image, sample in enumerate(self._sample_of) if running[sample]]
        samples = self._batch.image_sample[images]
        if len(samples) == len(self._sample_of):
            images = slice(None)  # needs no copies
        for scale in range(len(self._scales) - 1 if len(samples) else 0):
            attention_JL = attention_UL[scale * self._samples + samples]
            mask_JGG = self._next_scale(scale, images, attention_JL, answered)
            differs_J = (mask_JGG != self._read_SIGG[scale + 1, images]).flatten(1).any(1)
            self._read_SIGG[scale + 1, images] = (
                mask_JGG  # after a change, `_read` selects for further scales once more
            )
            known = {sample for earlier in found.values() for sample in earlier}
            if changed := set(samples[differs_J].tolist()) - known:
                found[scale + 1] = sorted(changed)
        return found

    def _next_scale(
        self, scale: int, images: list[int] | slice, attention_JL: torch.Tensor, answered: int
    ) -> torch.Tensor:
        """Return where tokens of the scale after `scale` are read, [J, G, G].

        Args:
            scale: the scale that was read.
            images: J images.
            attention_JL: of the last token of each image's sample, see `_last_row`.
            answered: tokens of the answers.
        """
        end, side = attention_JL.shape[1] - answered, self._read_SIGG.shape[-1]
        sum_JGG = attention_JL.new_zeros(len(attention_JL), side, side)
        for number, back_IN in enumerate(self._back[scale]):
            each, back_JN = self._scales[number], back_IN[images]
            assert each.attention_INN is not None
            weights_JN = attention_JL.gather(1, (end - back_JN).where(back_JN > 0, 0)) * (back_JN > 0)
            shares_JN = weights_JN / weights_JN.sum(1, keepdim=True)
            map_JN = torch.einsum("jn,jnm->jm", shares_JN, each.attention_INN[images])
            map_JYX = (map_JN / map_JN.amax(1, keepdim=True)).unflatten(1, (each.side, each.side))
            map_JGG = F.interpolate(map_JYX[:, None], size=(side, side))[:, 0]  # each value fills a square
            sum_JGG += 4**number * map_JGG * self._read_SIGG[number, images]
        if not sum_JGG.isfinite().all():
            raise _unseen(self._student.spec)
        return self._select(sum_JGG)

    def _keep_places(self, scale: int, staged: Staged, answered: int) -> None:
        length = staged.batch.input_ids.shape[1]
        back_L = length - answered - torch.arange(length, device=staged.batch.input_ids.device)
        for piece, back in staged.split(back_L.expand_as(staged.batch.input_ids)):
            self._back[scale][piece.scale][piece.image] = 0
            self._back[scale][piece.scale][piece.image, piece.tokens] = back

    def _keep_logits(self, scale: int, rows: Sequence[int], logits_RV: torch.Tensor) -> None:
        if self._logits_SBV is None:
            self._logits_SBV = logits_RV.new_zeros(len(self._scales), self._samples, logits_RV.shape[1])
        self._logits_SBV[scale, list(rows)] = logits_RV

    def _keep_attention(self, parts: Iterable[tuple[Piece, torch.Tensor]]) -> None:
        """Keep the question's attention to the last scale's tokens, the first time."""
        if self.attention_IN is not None:
            return
        features_IND = self._scales[-1].features_IND
        self.attention_IN = torch.zeros(features_IND.shape[:2], device=features_IND.device)
        for piece, weights in parts:
            if piece.scale == len(self._scales) - 1:
                self.attention_IN[piece.image, piece.tokens] = weights


class _JoinedCache:
    """Caches of prompts of different lengths as one, in which all rows end together.

    Args:
        rows: U.

    Attributes:
        cache: the cache, None before the first `put`.
        mask_UL: False at padding.
        gates: of the query mixture for each row, None without one.
    """

    def __init__(self, rows: int) -> None:
        self._rows = rows
        self.cache: Any = None
        self.mask_UL = torch.empty(0)
        self.gates: torch.Tensor | None = None

    def put(self, rows: Sequence[int], cache: Any, mask_RL: torch.Tensor, gates: torch.Tensor | None) -> None:
        """Put prompts in the place of these rows."""
        is_first = self.cache is None
        self.cache = cache if is_first else self.cache
        self.mask_UL = self._placed(None if is_first else self.mask_UL, rows, mask_RL, -1)
        if gates is not None:
            self.gates = self._placed(self.gates, rows, gates, -2)
        for layer, new in zip(self.cache.layers, cache.layers, strict=True):
            layer.keys, layer.values = (
                self._placed(None if is_first else old, rows, some, -2)
                for old, some in ((layer.keys, new.keys), (layer.values, new.values))
            )
            if hasattr(layer, "cumulative_length"):  # a layer with a window, which keeps the last keys only
                layer.cumulative_length = self.mask_UL.shape[1]

    def extend(self) -> torch.Tensor:
        """Return the mask with one more token, which the next pass adds to the cache."""
        self.mask_UL = F.pad(self.mask_UL, (0, 1), value=True)
        return self.mask_UL

    def _placed(self, all_U: torch.Tensor | None, rows: Sequence[int], some_R: torch.Tensor, dim: int) -> torch.Tensor:
        """Return all rows with some of them replaced, padded on the left to the length of the longer ones."""
        all_U = some_R.new_zeros(self._rows, *some_R.shape[1:]) if all_U is None else all_U
        longest, after = max(all_U.shape[dim], some_R.shape[dim]), (0, 0) * (-dim - 1)
        all_U, some_R = (F.pad(each, (*after, longest - each.shape[dim], 0)) for each in (all_U, some_R))
        all_U[list(rows)] = some_R
        return all_U


def _last_row(records: Iterable[RecordedRow], mask_RL: torch.Tensor) -> torch.Tensor:
    """Return the attention of each row's last token, [R, L], as the method defines it for all scales together."""
    length, parts = mask_RL.shape[1], list[torch.Tensor]()
    for record in records:
        assert record.weights_RHK is not None
        weights_RK = record.weights_RHK.mean(1)
        missing = length - weights_RK.shape[1]  # keys outside of a window
        parts.append(F.pad(weights_RK, (missing, 0)) if missing else weights_RK)
    weights_NRL = torch.stack(parts)  # N blocks
    first_R1 = mask_RL.int().argmax(-1, keepdim=True)
    weights_NRL = weights_NRL.scatter(2, first_R1.expand(len(parts), -1, -1), 0)
    return (weights_NRL / weights_NRL.sum(-1, keepdim=True)).mean(0)


def _with_answers(batch: Batch, ids_BT: torch.Tensor) -> Batch:
    """Return prompts with the answers so far at their end."""
    count = ids_BT.shape[1]
    return replace(
        map_tokens(batch, lambda values_BL, fill: F.pad(values_BL, (0, count), value=fill)),
        input_ids=torch.cat([batch.input_ids, ids_BT], dim=1),
        attention_mask=F.pad(batch.attention_mask, (0, count), value=True),
    )


def _unseen(spec: ModelSpec) -> ConfigError:
    covered = max((spec.window(block) or 0 for block in range(len(spec.blocks))), default=0)
    if not covered:
        return ConfigError(
            "the student's attention to the image is not finite; check its weights, and those of its base"
        )
    return ConfigError(
        "--decoding second reads the attention of the last token to the image, and a prompt with its answer is so long "
        f"that no block covers its image ({covered} tokens at most); choose another method"
    )
