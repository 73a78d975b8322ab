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
from medalign.decoding.scales import Piece, look, stage
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
        self._pieces: dict[int, list[tuple[Piece, torch.Tensor]]] = {}  # by row of the cache, see `_read`
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
                rows_R = ((self._batch.image_index >= 0).any(1) & running_B).nonzero().flatten()
                for scale, changed in self._changes(attention_UL, rows_R.tolist(), ids_BT.shape[1]).items():
                    self._read(ids_BT, changed, scale)
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
            # Places in a prompt are counted back from its end, since padding on the left changes.
            length = mask_RL.shape[1]
            back_RL = (length - answered - torch.arange(length, device=mask_RL.device)).expand_as(mask_RL)
            self._pieces |= {unit: [] for unit in units}
            for piece, back in staged.split(back_RL):
                sample = int(self._batch.image_sample[piece.image])
                self._pieces[scale * self._samples + sample].append((piece, back))
            if scale == last:
                self._keep_attention(staged.split(map_RL))
            else:
                attention_RL = _last_row(records.values(), mask_RL)
                images, mask_JGG = self._next_scale(scale, rows, attention_RL, answered)
                self._read_SIGG[scale + 1, images] = mask_JGG

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

    def _changes(self, attention_UL: torch.Tensor, rows: list[int], answered: int) -> dict[int, list[int]]:
        """Select tokens again. Returns, by the first scale of which others are read now, the samples."""
        found: dict[int, list[int]] = {}
        for scale in range(len(self._scales) - 1):
            if not rows:
                break
            units = [scale * self._samples + row for row in rows]
            images, mask_JGG = self._next_scale(scale, rows, attention_UL[units], answered)
            differs_J = (mask_JGG != self._read_SIGG[scale + 1, images]).flatten(1).any(1)
            self._read_SIGG[scale + 1, images] = mask_JGG
            samples = self._batch.image_sample[images][differs_J].unique().tolist()
            if samples:
                found[scale + 1] = samples
                rows = [row for row in rows if row not in samples]
        return found

    def _next_scale(
        self, scale: int, rows: Sequence[int], attention_RL: torch.Tensor, answered: int
    ) -> tuple[list[int], torch.Tensor]:
        """Return the images of samples, and where tokens of the scale after `scale` are read, [J, G, G].

        Args:
            scale: the scale that was read.
            rows: the samples.
            attention_RL: of each last token, see `_last_row`.
            answered: tokens of the answers.
        """
        maps: dict[int, torch.Tensor] = {}
        end = attention_RL.shape[1] - answered
        for row, attention_L in zip(rows, attention_RL, strict=True):
            for piece, back in self._pieces[scale * self._samples + row]:
                map_GG = self._map(piece, attention_L[end - back])
                maps[piece.image] = maps[piece.image] + map_GG if piece.image in maps else map_GG
        maps_JGG = torch.stack(list(maps.values()))
        if not maps_JGG.isfinite().all():
            raise _unseen(self._student.spec)
        return list(maps), self._select(maps_JGG)

    def _map(self, piece: Piece, weights: torch.Tensor) -> torch.Tensor:
        """Return the map [G, G] of the attention to a piece."""
        scale = self._scales[piece.scale]
        assert scale.attention_INN is not None
        map_N = weights / weights.sum() @ scale.attention_INN[piece.image, piece.tokens]
        map_YX = (map_N / map_N.max()).unflatten(0, (scale.side, scale.side))
        step = self._read_SIGG.shape[-1] // scale.side
        map_GG = map_YX.repeat_interleave(step, 0).repeat_interleave(step, 1)
        shown_GG: torch.Tensor = 4**piece.scale * map_GG * self._read_SIGG[piece.scale, piece.image]
        return shown_GG

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
    first_R1, parts = mask_RL.int().argmax(-1, keepdim=True), list[torch.Tensor]()
    for record in records:
        assert record.weights_RHK is not None
        weights_RK = record.weights_RHK.mean(1)
        weights_RL = F.pad(weights_RK, (mask_RL.shape[1] - weights_RK.shape[1], 0))  # keys outside of a window
        weights_RL = weights_RL.scatter(1, first_R1, 0)
        parts.append(weights_RL / weights_RL.sum(-1, keepdim=True))
    return torch.stack(parts).mean(0)


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
    return ConfigError(
        "--decoding second reads the attention of the prompt's last token to the image, and a prompt is so long that "
        f"no block covers its image ({covered} tokens at most); choose another method"
    )
