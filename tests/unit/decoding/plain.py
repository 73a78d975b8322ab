"""Decoding methods once more, written from their papers: one sample, no cache, eager attention, loops.

They share nothing with the package but the student's forward pass. `Scope` gives a test the attention of each block.
"""

from __future__ import annotations

import math
import statistics
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.svm import SVC

from medalign.contracts import Batch
from medalign.student.model import Student

Scores = torch.Tensor  # [H, L, L] of one sample
Outputs = torch.Tensor  # [H, L, D] of one sample


class Scope:
    """Changes and sees the eager attention of the blocks of a student that was loaded with attention "eager".

    `scores(block, scores)` may change the scaled scores before mask and softmax, `outputs(block, outputs)` the outputs
    of the heads. `weights` and `values` hold the attention of each block in the last pass, and its values.
    """

    def __init__(self, student: Student) -> None:
        self.blocks = {id(attention): block for block, attention in enumerate(student.spec.attentions)}
        self.module = sys.modules[type(student.spec.attentions[0]).__module__]
        self.scores: Callable[[int, Scores], Scores] = lambda block, scores: scores
        self.outputs: Callable[[int, Outputs], Outputs] = lambda block, outputs: outputs
        self.weights: dict[int, torch.Tensor] = {}
        self.values: dict[int, torch.Tensor] = {}

    @contextmanager
    def entered(self) -> Iterator[Scope]:
        """Replace the eager attention of the model's file, inside the context."""
        original = self.module.eager_attention_forward

        def attend(module: Any, query: Any, key: Any, value: Any, attention_mask: Any, scaling: float, **kwargs: Any):
            block = self.blocks.get(id(module))
            if block is None:  # a vision tower in the same file
                return original(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
            assert len(query) == 1
            groups = query.shape[1] // key.shape[1]
            key, value = key[0].repeat_interleave(groups, 0), value[0].repeat_interleave(groups, 0)
            scores = query[0] @ key.transpose(1, 2) * scaling
            if cap := kwargs.get("softcap"):
                scores = cap * torch.tanh(scores / cap)
            weights = (self.scores(block, scores) + attention_mask[0]).softmax(-1)
            self.weights[block], self.values[block] = weights, value
            return self.outputs(block, weights @ value).transpose(0, 1)[None], None

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(self.module, "eager_attention_forward", attend)
            yield self


@torch.no_grad()
def logits(student: Student, sample: Batch, answer: list[int]) -> torch.Tensor:
    """Logits [V] after the prompt and these tokens. A token is appended, whose label asks for the logits before it."""
    more = sample.input_ids.new_tensor([[*answer, 9]])
    tail = torch.zeros_like(more, dtype=torch.bool)
    longer = replace(
        sample,
        input_ids=torch.cat([sample.input_ids, more], 1),
        attention_mask=torch.cat([sample.attention_mask, ~tail], 1),
        labels=torch.cat([torch.full_like(sample.labels, -100), torch.full_like(more, -100)], 1),
        question_mask=torch.cat([sample.question_mask, tail], 1),
        image_index=torch.cat([sample.image_index, torch.full_like(more, -1)], 1),
        cell_mask=None if sample.cell_mask is None else torch.cat([sample.cell_mask, tail], 1),
    )
    longer.labels[0, -1] = 9
    return student(longer, tap=False).logits[0, -1].float()


def without_image(sample: Batch) -> Batch:
    """The sample without its image tokens."""
    kept = sample.image_index[0] < 0
    names = ("input_ids", "attention_mask", "labels", "question_mask", "image_index")
    cell_mask = None if sample.cell_mask is None else sample.cell_mask[:, kept]
    return replace(sample, cell_mask=cell_mask, **{name: getattr(sample, name)[:, kept] for name in names})


def greedy(choose: Callable[[list[int]], torch.Tensor], ends: list[int], limit: int) -> list[int]:
    """The answer whose next token is the best under `choose(answer)`, [V]."""
    answer: list[int] = []
    while len(answer) < limit and not (answer and answer[-1] in ends):
        answer.append(int(choose(answer).argmax()))
    return answer


def pai(
    student: Student, sample: Batch, limit: int, alpha: float, gamma: float, plausible: float, first_block: int
) -> list[int]:
    """Raise the scores of the image's columns in each row that predicts an answer token; refine the logits."""
    image, prompt = (sample.image_index[0] >= 0).nonzero().flatten().tolist(), sample.input_ids.shape[1]
    scope = Scope(student)

    def raised(block: int, scores: Scores) -> Scores:
        if block < first_block:
            return scores
        scores = scores.clone()
        for row in range(prompt - 1, scores.shape[1]):
            for column in image:
                scores[:, row, column] = scores[:, row, column] + alpha * scores[:, row, column].abs()
        return scores

    def refined(answer: list[int]) -> torch.Tensor:
        scope.scores = raised
        own = logits(student, sample, answer).log_softmax(-1)
        if gamma == 1:
            return own
        scope.scores = lambda block, scores: scores
        other = logits(student, without_image(sample), answer).log_softmax(-1)
        mixed = gamma * own - (gamma - 1) * other
        return mixed if not plausible else mixed.masked_fill(own < own.max() + math.log(plausible), -math.inf)

    with scope.entered():
        return greedy(refined, student.end_tokens, limit)


def vhr(student: Student, sample: Batch, limit: int, alpha: float, blocks: list[int]) -> list[int]:
    """Find, block by block, the heads whose output the image changes most, and multiply their outputs."""
    scope, prompt = Scope(student), sample.input_ids.shape[1]
    absent: dict[int, Outputs] = {}
    heads: dict[int, list[int]] = {}

    def record(block: int, outputs: Outputs) -> Outputs:
        absent[block] = outputs[:, -2].clone()  # the last token is the one that `logits` appends
        return outputs

    def reinforce(block: int, outputs: Outputs) -> Outputs:
        if block not in blocks:
            return outputs
        if block not in heads:
            pairs = list(zip(outputs[:, prompt - 1], absent[block], strict=True))
            changes = [math.dist(own.tolist(), other.tolist()) for own, other in pairs]
            unlike = [0.001 * math.hypot(*own.tolist()) for own, _ in pairs]
            changes = [change * (change >= least) for change, least in zip(changes, unlike, strict=True)]
            sizes = [sum(value * value for value in other.tolist()) for _, other in pairs]
            limits = [statistics.mean(values) + statistics.stdev(values) for values in (changes, sizes)]
            for head in range(len(changes)):
                if changes[head] > limits[0] and sizes[head] > limits[1]:
                    changes[head] = 0.0
            heads[block] = [head for head, change in enumerate(changes) if change > statistics.median(changes)]
        outputs = outputs.clone()
        outputs[heads[block]] *= alpha
        return outputs

    with scope.entered():
        scope.outputs = record
        logits(student, without_image(sample), [])
        scope.outputs = reinforce
        return greedy(lambda answer: logits(student, sample, answer), student.end_tokens, limit)


def cai_heads(
    student: Student, descriptions: list[Batch], questions: list[Batch], count: int
) -> tuple[list[tuple[int, int]], dict[tuple[int, int], torch.Tensor]]:
    """The heads that tell descriptions from questions, the best first, and the shift of every head."""
    scope = Scope(student)
    whole: dict[tuple[int, int], list[list[torch.Tensor]]] = {}
    seen: dict[tuple[int, int], list[list[torch.Tensor]]] = {}
    with scope.entered():
        for side, samples in enumerate((descriptions, questions)):
            for sample in samples:
                logits(student, sample, [])
                last, image = sample.input_ids.shape[1] - 1, (sample.image_index[0] >= 0).nonzero().flatten().tolist()
                for block, weights in scope.weights.items():
                    for head, values in enumerate(scope.values[block]):
                        row = weights[head, last]
                        whole.setdefault((block, head), [[], []])[side].append(row @ values)
                        part = sum(row[column] * values[column] for column in image)
                        seen.setdefault((block, head), [[], []])[side].append(part)
    ranked = []
    for place, (described, asked) in seen.items():
        right, loss = 0, 0.0
        for held in range(4):
            fit = [pair for pair in range(len(asked)) if pair % 4 != held]
            known = np.array([views[pair].tolist() for views in (described, asked) for pair in fit])
            middle, spread = known.mean(0), known.std(0)
            spread[spread == 0] = 1
            machine = SVC(kernel="linear").fit((known - middle) / spread, [1] * len(fit) + [-1] * len(fit))
            for pair in set(range(len(asked))) - set(fit):
                for sign, views in ((1, described), (-1, asked)):
                    margin = sign * machine.decision_function([(np.array(views[pair].tolist()) - middle) / spread])[0]
                    right, loss = right + (margin > 0), loss + max(0.0, 1 - margin)
        ranked.append((-right, loss, place))
    shifts = {place: torch.stack(ones).mean(0) - torch.stack(others).mean(0) for place, (ones, others) in whole.items()}
    return [place for _, _, place in sorted(ranked)[:count]], shifts


def cai(student: Student, sample: Batch, limit: int, shifts: dict[tuple[int, int], torch.Tensor]) -> list[int]:
    """Shift the outputs of these heads in each row that predicts an answer token."""
    scope, prompt = Scope(student), sample.input_ids.shape[1]

    def shift(block: int, outputs: Outputs) -> Outputs:
        outputs = outputs.clone()
        for (each, head), added in shifts.items():
            if each == block:
                outputs[head, prompt - 1 :] += added
        return outputs

    with scope.entered():
        scope.outputs = shift
        return greedy(lambda answer: logits(student, sample, answer), student.end_tokens, limit)


def opera(
    student: Student,
    sample: Batch,
    limit: int,
    *,
    num_beams: int,
    candidates: int,
    penalty: float,
    scale: float,
    threshold: int,
    rollbacks: int,
    first_tokens: int,
    factor: float,
    normalize: str,
    reselect: str,
) -> tuple[list[int], list[int]]:
    """Beam search with over-trust penalty and returns. Returns the answer and the places to which it returned."""
    scope, last = Scope(student), len(student.spec.blocks) - 1
    prompt, image = sample.input_ids.shape[1], (sample.image_index[0] >= 0)
    returned: list[int] = []

    def mode(values: list[int]) -> int:
        counts = Counter(values)
        return min(value for value in counts if counts[value] == max(counts.values()))

    def judge(answer: list[int]) -> tuple[float, int, float]:
        """The largest product of a column, its place, and the last token's attention to the image."""
        logits(student, sample, answer)
        rows = scope.weights[last].max(0).values.double()[: prompt + len(answer), : prompt + len(answer)]
        rows = rows / rows.sum(-1, keepdim=True)
        share = float(rows[-1, :prompt][image].sum())
        local = scale * rows[prompt:, prompt:]
        products = [math.prod(local[j:, j].tolist()) for j in range(len(answer))]
        return max(products), products.index(max(products)), share

    beams: list[tuple[float, list[int]]] = [(0.0, [])] + [(-1e9, [])] * (num_beams - 1)
    finished: list[tuple[float, list[int]]] = []
    history: list[dict[str, Any]] = []
    visits: Counter[int] = Counter()
    with scope.entered():
        while True:
            length = len(beams[0][1])
            if length == limit:
                break
            if len(finished) == num_beams and beams[0][0] / max(length, 1) <= finished[-1][0]:
                break
            raw = [logits(student, sample, tokens) for _, tokens in beams]
            table: list[list[tuple[int, float]]] = []
            places: list[int] = []
            for (_, tokens), own in zip(beams, raw, strict=True):
                top = own.topk(candidates)
                judged = [judge([*tokens, token]) for token in top.indices.tolist()]
                places.append(mode([place for _, place, _ in judged]))
                excess = [-share if length < first_tokens else factor * value for value, _, share in judged]
                scores = top.values - penalty * torch.tensor(excess)
                if normalize == "candidates":
                    chances = scores.log_softmax(-1)
                else:
                    changed = own.clone()
                    changed[top.indices] = scores
                    chances = changed.log_softmax(-1)[top.indices]
                table.append(list(zip(top.indices.tolist(), chances.tolist(), strict=True)))
            history.append({"beams": beams, "finished": finished, "places": places, "raw": raw, "rejected": []})
            summary, target = mode(places), None
            counts = [sum(step["places"][row] == summary for step in history) for row in range(num_beams)]
            if min(counts) > threshold and summary >= first_tokens:
                for place in (summary + 1, summary):
                    used = [row for row in range(num_beams) if history[place]["beams"][row][0] > -1e8]
                    gone = [row for row, _ in history[place]["rejected"] + history[place]["chosen"] if row in used]
                    left = math.inf if reselect == "vocabulary" else len(used) * candidates - len(gone)
                    if target is None and visits[place] < rollbacks and left >= num_beams:
                        visits[place] += 1
                        target = place
            if target is not None:
                returned.append(target)
                history = history[: target + 1]
                step = history[target]
                step["rejected"] += step["chosen"]
                beams, finished = step["beams"], step["finished"]
                table = []
                for row, own in enumerate(step["raw"]):
                    masked = own.clone()
                    if reselect == "candidates":
                        masked[own < own.topk(candidates).values[-1]] = -math.inf
                    masked[[token for beam, token in step["rejected"] if beam == row]] = -math.inf
                    table.append(list(enumerate(masked.log_softmax(-1).tolist())))
            every = [
                (beams[row][0] + chance, row, token)
                for row, choices in enumerate(table)
                for token, chance in choices
                if math.isfinite(chance)
            ]
            every.sort(key=lambda item: -item[0])
            length = len(beams[0][1]) + 1
            kept, going = every[: max(2, 1 + len(student.end_tokens)) * num_beams], []
            for rank, (score, row, token) in enumerate(kept):
                tokens = [*beams[row][1], token]
                if token in student.end_tokens or length == limit:
                    if rank < num_beams:
                        finished = sorted([*finished, (score / length, tokens)], key=lambda item: -item[0])
                        finished = finished[:num_beams]
                    score -= 1e9
                going.append((score, row, token, tokens))
            going.sort(key=lambda item: -item[0])
            going = going[:num_beams]
            history[-1]["chosen"] = [(row, token) for _, row, token, _ in going]
            beams = [(score, tokens) for score, _, _, tokens in going]
    return finished[0][1], returned
