"""The attention heads that tell requests for a description from questions, for `methods.cai`.

Shape suffixes: B samples of a batch, S samples, H heads, D head dimension, K keys, F features.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from medalign.contracts import Batch, Sample
from medalign.data.batches.collator import Collator, Prepared
from medalign.data.batches.reader import prepare
from medalign.data.samples.bad_sample import BadSample
from medalign.data.shards.index import ShardIndex
from medalign.decoding.interventions import last_scores, mask_scores, mix_values
from medalign.student.capture import Output, intervening
from medalign.student.model import Student

log = logging.getLogger("medalign")

FOLDS = 4
_BATCH = 8  # samples that are read at once
_SEED = 0  # of the order in which samples are taken
_ITERATIONS = 100_000  # of one fit; where a head hardly sees the image its outputs are rounding, and a fit may not end


class Pair(NamedTuple):
    """The same images with a request for a description and with a question each."""

    description: Batch
    question: Batch


@dataclass(frozen=True)
class CaptionHeads:
    """Heads, the best first, and the shifts of all heads.

    Attributes:
        places: block and head.
        accuracies: of the classifier of each head, on images that it has not seen.
        shifts: [H, D] of each block, float32: the mean output under a description less that under a question.
    """

    places: tuple[tuple[int, int], ...]
    accuracies: tuple[float, ...]
    shifts: tuple[torch.Tensor, ...]


class Outputs(NamedTuple):
    """Outputs of a block's heads at the last tokens of prompts: whole, and the part that comes from the image."""

    whole_SHD: torch.Tensor
    image_SHD: torch.Tensor

    @classmethod
    def joined(cls, parts: Sequence[Outputs]) -> Outputs:
        """Join the outputs of several batches."""
        return cls(*(torch.cat(each) for each in zip(*parts, strict=True)))


class RecordedOutputs:
    """Records the outputs of a block's heads in the first pass, in `outputs`, and changes nothing.

    Args:
        image_BL: True at the image tokens of the prompts.
    """

    def __init__(self, image_BL: torch.Tensor) -> None:
        self._image_BL = image_BL
        self.outputs: Outputs | None = None

    def __call__(
        self,
        attend: Any,
        module: nn.Module,
        query_BHLD: torch.Tensor,
        key_BGKD: torch.Tensor,
        value_BGKD: torch.Tensor,
        attention_mask: torch.Tensor | None,
        /,
        **kwargs: Any,
    ) -> Output:
        """Call the backend, and record its last row if it is the first call."""
        output: Output = attend(module, query_BHLD, key_BGKD, value_BGKD, attention_mask, **kwargs)
        if self.outputs is None:
            scores_BHK = last_scores(query_BHLD, key_BGKD, **kwargs)
            weights_BHK = mask_scores(scores_BHK, attention_mask, **kwargs).softmax(-1)
            image_BHD = mix_values(weights_BHK * self._image_BL[:, None], value_BGKD)
            self.outputs = Outputs(output[0][:, -1].float().cpu(), image_BHD.float().cpu())
        return output


def questions(index: ShardIndex) -> list[int]:
    """Return the samples with a question about an image."""
    return [i for i in range(len(index)) if index.task(i) == "vqa" and index.size(i) != (0, 0)]


def read_pairs(index: ShardIndex, collator: Collator, request: str, count: int) -> list[Pair]:
    """Read questions about different images, each also with a request for a description.

    Args:
        index: of the samples.
        collator: makes batches of questions.
        request: the request.
        count: how many images; fewer are read if there are no more.
    """
    images: set[int] = set()
    prepared: list[tuple[Prepared, Prepared]] = []
    for i in np.random.default_rng(_SEED).permutation(questions(index)).tolist():
        if len(prepared) == count:
            break
        try:
            sample = index.read(i)
            if _is_new(sample, images):
                prepared.append((prepare(collator, replace(sample, question=request)), prepare(collator, sample)))
        except BadSample as error:
            log.warning("bad sample skipped: %s", error)
    parts = [prepared[start : start + _BATCH] for start in range(0, len(prepared), _BATCH)]
    return [Pair(*(collator.join(views) for views in zip(*part, strict=True))) for part in parts]


def find_heads(student: Student, pairs: Sequence[Pair], share: float) -> CaptionHeads:
    """Find the heads whose outputs tell the two apart.

    Args:
        student: the student.
        pairs: at least as many as there are folds.
        share: of all heads, how many are taken; at least one.
    """
    described, asked = ([_read(student, pair[side]) for pair in pairs] for side in (0, 1))
    ranked, shifts, unended = [], [], 0
    for block in range(len(student.spec.blocks)):
        description, question = (Outputs.joined([outputs[block] for outputs in views]) for views in (described, asked))
        for head in range(description.image_SHD.shape[1]):
            features = (view.image_SHD[:, head].numpy() for view in (description, question))
            accuracy, loss, ended = separation(*features)
            ranked.append((-accuracy, loss, block, head))
            unended += not ended
        shifts.append((description.whole_SHD - question.whole_SHD).mean(0))
    best = sorted(ranked)[: max(1, round(share * len(ranked)))]
    places = tuple((block, head) for _, _, block, head in best)
    log.info(
        "cai takes %d of %d heads, whose classifiers have an accuracy of %.2f to %.2f (block.head): %s",
        *(len(best), len(ranked), -best[-1][0], -best[0][0]),
        ", ".join(f"{block}.{head}" for block, head in places),
    )
    if unended:
        log.info("the classifiers of %d of %d heads did not converge; they count as they are", unended, len(ranked))
    return CaptionHeads(places, tuple(-accuracy for accuracy, *_ in best), tuple(shifts))


def separation(description_SF: np.ndarray, question_SF: np.ndarray) -> tuple[float, float, bool]:
    """Fit linear support vector machines and apply each to images that it has not seen.

    Args:
        description_SF: features under descriptions.
        question_SF: features of the same images under questions.

    Returns:
        The accuracy, the mean hinge loss, and whether all fits have converged.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from sklearn.svm import SVC

    count = len(description_SF)
    features = np.concatenate([description_SF, question_SF])
    label, fold = np.repeat([1, -1], count), np.tile(np.arange(count) % FOLDS, 2)
    margin = np.zeros(2 * count)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ConvergenceWarning)
        for held in range(FOLDS):
            out = fold == held
            model = make_pipeline(StandardScaler(), SVC(kernel="linear", max_iter=_ITERATIONS))
            margin[out] = label[out] * model.fit(features[~out], label[~out]).decision_function(features[out])
    ended = not any(issubclass(each.category, ConvergenceWarning) for each in caught)
    return float((margin > 0).mean()), float(np.maximum(0, 1 - margin).mean()), ended


@torch.no_grad()
def _read(student: Student, batch: Batch) -> list[Outputs]:
    """Read prompts. Returns the outputs of each block."""
    batch = batch.to(student.model.device)
    records = {attention: RecordedOutputs(batch.image_index >= 0) for attention in student.spec.attentions}
    with intervening(records):
        student.generate(batch, max_new_tokens=1, do_sample=False, pad_token_id=0)
    return [record.outputs for record in records.values() if record.outputs is not None]


def _is_new(sample: Sample, images: set[int]) -> bool:
    """Return whether a sample has one image, which no sample before has."""
    if len(sample.images) != 1:
        return False
    image = sample.images[0]
    content = hash((image.mode, image.size, image.tobytes()))
    new = content not in images
    images.add(content)
    return new
