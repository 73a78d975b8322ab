"""OPERA: a penalty on columns of attention that all later tokens rely on, in a beam search that rolls back.

Source: Huang et al., "OPERA: Alleviating Hallucination in Multi-Modal Large Language Models via Over-Trust Penalty and
Retrospection-Allocation", CVPR 2024 (arXiv 2311.17911), and the authors' code (github.com/shikiw/OPERA).

Let w[i, j] be the attention of answer token i to answer token j in the last block: the largest over the heads, divided
by its sum over all columns. A candidate for the next token is passed through the model, which gives its row t. With

    phi = factor * max over j of prod over i = j..t of (scale * w[i, j])

the candidate's logit becomes `logit - penalty * phi`. If the column of the maximum has been the same token, a summary,
in more than `threshold` steps, the search returns to the place after it and excludes the tokens that were chosen there.
It returns to the same place at most `rollbacks` times, then to the place of the summary itself, and then not at all.

The paper and the authors' code differ. The defaults are those of the code; settings choose the paper's form:

- `first_tokens`: for the first 10 tokens, phi is minus the candidate's attention to the image, and none of them is a
  summary. The paper has no such rule: 0.
- `factor`: 1e-7. The paper has no factor: 1.
- `normalize`: probabilities are normalized over the candidates. By the paper's formula, over the vocabulary.
- `reselect`: after a return, all other tokens may be chosen, without a penalty. In the paper, the other candidates; a
  place where fewer of them than beams are left is passed over.

The code multiplies columns in float16, in which they overflow; here logarithms are added in float64. It keeps the
columns of up to 512 tokens; here all are kept. Its `rollbacks` is the number of candidates.

Each sample is searched by itself, so that one sample's rollback does not hold up the others: a pass has the candidates
of all beams of a sample as rows. The pass of a chosen candidate is kept, so a step costs one pass of
`num_beams * candidates` rows.

Shape suffixes: R beams, C candidates, V vocabulary size, T answer tokens so far, K columns, L tokens of the prompt.
"""

from __future__ import annotations

import math
from collections import Counter
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch

from medalign.config import StudentConfig
from medalign.contracts import Batch
from medalign.decoding.base import Decoding, Method, setting
from medalign.decoding.beam_search import Beams
from medalign.decoding.interventions import RecordedRow
from medalign.errors import ConfigError
from medalign.student.capture import intervening
from medalign.student.families.base import ModelSpec
from medalign.student.model import Student

_LARGEST = math.log(1e30)  # of phi, so that differences between logits stay finite


@dataclass(frozen=True)
class OPERA(Method):
    """Over-trust penalty and retrospection-allocation."""

    name: ClassVar[str] = "opera"
    beams: ClassVar[str] = "it is a beam search of its own, with --decoding.opera.num_beams"
    samples: ClassVar[str] = "it is a beam search"

    num_beams: int = setting(5, "beams", least=1)
    candidates: int = setting(5, "candidates for the next token of each beam", least=1)
    penalty: float = setting(1.0, "weight of the penalty", least=0, most=1000)
    scale: float = setting(50.0, "factor of each attention weight", least=1, most=1000)
    threshold: int = setting(15, "steps with the same summary token after which the search returns to it", least=2)
    rollbacks: int = setting(5, "most returns to the same token", least=0)
    first_tokens: int = setting(10, "tokens judged by their attention to the image; 0 as in the paper", least=0)
    factor: float = setting(1e-7, "factor of the product of a column; 1 as in the paper", least=0, most=1)
    normalize: Literal["candidates", "vocabulary"] = setting("candidates", "over what probabilities are normalized")
    reselect: Literal["vocabulary", "candidates"] = setting("vocabulary", "what may be chosen after a return")

    def check(self, spec: ModelSpec, config: StudentConfig) -> None:
        """Refuse a student whose last block does not see all tokens, or that has fewer tokens than candidates."""
        if self.candidates > (vocabulary := len(spec.model.get_output_embeddings().weight)):
            raise ConfigError(
                f"{self.option('candidates')} is {self.candidates}, but the student has only {vocabulary} tokens"
            )
        last = len(spec.blocks) - 1
        if window := spec.window(last):
            raise ConfigError(
                f"--decoding opera reads the attention of the last block to all tokens, but in this student it (block "
                f"{last}) covers only {window}; choose another method"
            )

    def generate(
        self, student: Student, batch: Batch, decoding: Decoding, **tokens: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Search the samples one after another."""
        found: list[torch.Tensor] = []
        maps: list[torch.Tensor] = []
        for row in range(len(batch.input_ids)):
            sample = batch.sample(row)
            search = _Search(self, student, sample, decoding.max_new_tokens)
            with intervening({student.spec.attentions[-1]: search.record}):
                ids_BT, maps_IN = student.generate(
                    sample, custom_generate=search, max_new_tokens=decoding.max_new_tokens, do_sample=False, **tokens
                )
            found.append(ids_BT[0])
            if maps_IN is not None:
                maps.append(maps_IN)
        ids_BT = torch.nn.utils.rnn.pad_sequence(found, batch_first=True, padding_value=tokens["pad_token_id"])
        return ids_BT, torch.cat(maps) if maps else None


@dataclass
class _Step:
    """What is known when a token is chosen, as far as a return needs it."""

    beams: Beams
    columns_RT: torch.Tensor  # logarithm of each column's product, float64
    summaries: list[int]  # of each beam
    chosen: tuple[torch.Tensor, torch.Tensor] | None = None  # of each new beam, its old one and its token
    rejected: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)


@dataclass
class _State:
    """The running hypotheses and the model's state after them."""

    beams: Beams
    columns_RT: torch.Tensor
    logits_RV: torch.Tensor
    cache: Any


class _Search:
    """The search of one sample. transformers calls it in place of its own loop.

    Args:
        settings: the settings.
        student: the student.
        sample: a batch of one sample without padding.
        limit: the most tokens of the answer.
    """

    def __init__(self, settings: OPERA, student: Student, sample: Batch, limit: int) -> None:
        self.record = RecordedRow()
        self._settings, self._limit = settings, limit
        self._image_L = (sample.image_index >= 0)[0]
        self._ends = sample.input_ids.new_tensor(student.end_tokens)
        self._steps: list[_Step] = []
        self._returns: Counter[int] = Counter()
        self._model: Any = None
        self._prompt: tuple[torch.Tensor, Any] | None = None

    def __call__(
        self,
        model: Any,
        input_ids: torch.Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        **inputs: Any,
    ) -> torch.Tensor:
        """Search, and return the prompt with the best answer, [1, L + T]."""
        self._model = model
        output = model(**model.prepare_inputs_for_generation(input_ids, is_first_iteration=True, **inputs))
        self._prompt = output.logits[:, -1].float(), output.past_key_values
        count = self._settings.num_beams
        beams = Beams.start(count, input_ids.device)
        state = self._replay(beams, torch.zeros(count, 0, dtype=torch.float64, device=input_ids.device))
        while not state.beams.is_done(self._limit):
            state = self._advance(state)
        best = state.beams.finished[0].tokens if state.beams.finished else state.beams.tokens_RT[0]
        return torch.cat([input_ids, best[None]], dim=1)

    def _advance(self, state: _State) -> _State:
        """Choose the next token of each beam, or return to an earlier place and choose another one there."""
        own, count = self._settings, self._settings.candidates
        logits_RC, tokens_RC = state.logits_RV.topk(count)
        state.cache.batch_repeat_interleave(count)
        columns, share, ahead = self._pass(tokens_RC.reshape(-1, 1), state.cache, state.columns_RT, count)
        largest_RC, places_RC = (values.view_as(tokens_RC) for values in columns.max(-1))
        self._steps.append(_Step(state.beams, state.columns_RT, [_mode(row) for row in places_RC.tolist()]))
        place = self._place_to_return()
        if place is not None:
            return self._reselect(place)
        excess_RC = own.factor * largest_RC.clamp(max=_LARGEST).exp()
        if state.beams.tokens_RT.shape[1] < own.first_tokens:
            excess_RC = -share.view_as(tokens_RC)
        judged_RC = logits_RC - own.penalty * excess_RC.float()
        if own.normalize == "candidates":
            log_probs_RC = judged_RC.log_softmax(-1)
        else:
            log_probs_RC = state.logits_RV.scatter(1, tokens_RC, judged_RC).log_softmax(-1).gather(1, tokens_RC)
        beams, picked_R = state.beams.advance(tokens_RC, log_probs_RC, self._ends, self._limit)
        self._steps[-1].chosen = picked_R // count, tokens_RC.flatten()[picked_R]
        state.cache.batch_select_indices(picked_R)
        return _State(beams, columns[picked_R], ahead[picked_R], state.cache)

    def _place_to_return(self) -> int | None:
        """Return the number of answer tokens that are kept, or None to go on."""
        own, summary = self._settings, _mode(self._steps[-1].summaries)
        counts = [sum(step.summaries[row] == summary for step in self._steps) for row in range(own.num_beams)]
        if min(counts) <= own.threshold or summary < own.first_tokens:
            return None
        for place in (summary + 1, summary):
            if self._returns[place] < own.rollbacks and self._choices_left(self._steps[place]) >= own.num_beams:
                self._returns[place] += 1
                return place
        return None

    def _choices_left(self, step: _Step) -> float:
        """Return how many choices a return to a step would leave."""
        if self._settings.reselect == "vocabulary":
            return math.inf
        assert step.chosen is not None
        used_R = step.beams.in_use
        gone = sum(int(used_R[rows].sum()) for rows, _ in (*step.rejected, step.chosen))
        return int(used_R.sum()) * self._settings.candidates - gone

    def _reselect(self, place: int) -> _State:
        """Go back to where `place` tokens were chosen, and choose others than before as the next ones."""
        step = self._steps[place]
        del self._steps[place + 1 :]
        assert step.chosen is not None
        step.rejected.append(step.chosen)
        state = self._replay(step.beams, step.columns_RT)
        log_probs_RV = state.logits_RV
        if self._settings.reselect == "candidates":
            least_R1 = log_probs_RV.topk(self._settings.candidates).values[:, -1:]
            log_probs_RV = log_probs_RV.masked_fill(log_probs_RV < least_R1, -torch.inf)
        for rows, tokens in step.rejected:
            log_probs_RV[rows, tokens] = -torch.inf
        log_probs_RV = log_probs_RV.log_softmax(-1).nan_to_num(-torch.inf, neginf=-torch.inf)
        size = log_probs_RV.shape[1]
        tokens_RV = torch.arange(size, device=log_probs_RV.device).expand_as(log_probs_RV)
        beams, picked_R = step.beams.advance(tokens_RV, log_probs_RV, self._ends, self._limit)
        step.chosen = picked_R // size, picked_R % size
        state.cache.batch_select_indices(picked_R // size)
        kept_RT = step.columns_RT[picked_R // size]
        columns, _, logits_RV = self._pass(beams.tokens_RT[:, -1:], state.cache, kept_RT, 1)
        return _State(beams, columns, logits_RV, state.cache)

    def _replay(self, beams: Beams, columns_RT: torch.Tensor) -> _State:
        """Return the state after the tokens of these hypotheses, from the cache of the prompt.

        Token by token: to the student, a pass of many tokens is that of a prompt.
        """
        assert self._prompt is not None
        logits_BV, cache = self._prompt[0], deepcopy(self._prompt[1])
        cache.batch_repeat_interleave(len(beams.scores_R))
        logits_RV = logits_BV.repeat(len(beams.scores_R), 1)
        for token_R1 in beams.tokens_RT.T[..., None]:
            logits_RV = self._forward(token_R1, cache)
        return _State(beams, columns_RT, logits_RV, cache)

    def _pass(
        self, tokens_M1: torch.Tensor, cache: Any, columns_RT: torch.Tensor, count: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Pass tokens through the model, `count` of them for each beam (M of all).

        Returns:
            The logarithms of the columns' products with the rows of these tokens [M, T + 1], the attention of these
            tokens to the image [M], and the logits after them [M, V].
        """
        logits_MV = self._forward(tokens_M1, cache)
        assert self.record.weights_RHK is not None
        row_MK = self.record.weights_RHK.amax(1).double()
        row_MK = row_MK / row_MK.sum(-1, keepdim=True)
        prompt = len(self._image_L)
        before_MT = columns_RT.repeat_interleave(count, dim=0)
        columns_MT = torch.nn.functional.pad(before_MT, (0, 1)) + (self._settings.scale * row_MK[:, prompt:]).log()
        return columns_MT, row_MK[:, :prompt][:, self._image_L].sum(-1), logits_MV

    def _forward(self, tokens_M1: torch.Tensor, cache: Any) -> torch.Tensor:
        output = self._model(input_ids=tokens_M1, past_key_values=cache, use_cache=True)
        logits_MV: torch.Tensor = output.logits[:, -1].float()
        return logits_MV


def _mode(values: list[int]) -> int:
    """Return the most frequent value; the smallest of several."""
    counts = Counter(values)
    return min(counts, key=lambda value: (-counts[value], value))
