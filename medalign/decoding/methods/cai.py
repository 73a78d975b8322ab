"""CAI: what a request for a description changes in the heads that respond to it is added to them for every question.

Source: Li et al., "CAI: Caption-Sensitive Attention Intervention for Mitigating Object Hallucination in Large
Vision-Language Models", arXiv 2506.23590, later "CAST", arXiv 2605.04641. There is no code of the authors, and of the
papers only the abstracts and the reviews of a submission could be read. From these is the form:

1. Images are read with a request for a description and with a question each. A is the output of a head at the last
   token, before the output projection; A' is the part of it that comes from the image, since the attention to text is
   masked.
2. For each head, a support vector machine learns to tell the two from A'. The heads where it does best are taken.
3. In each pass, `alpha` times the mean of A(description) - A(question) is added to the outputs of these heads at the
   last token.

**The numbers could not be read, so the defaults are not published ones.** With `alpha` 1, the mean output under
questions becomes that under descriptions. `share` is that of the method that introduced such shifts (Li et al.,
"Inference-Time Intervention", NeurIPS 2023, arXiv 2306.03341: 48 of 1,024 heads). `request` is the question with which
this package asks for reports. Chosen here, too: the classifier is linear, its inputs are standardized, heads are
compared by its accuracy in 4-fold cross-validation over images and then by its hinge loss, and attention is masked
after the softmax.

The shards must have other images than those that are asked. A sample without an image is decoded as without the method.

Shape suffixes: B samples, R rows of a pass, H heads, L tokens, D head dimension.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from typing import Any, ClassVar, Self

import torch
from torch import nn

from medalign.config import StudentConfig
from medalign.contracts import Batch
from medalign.data.batches.collator import Collator
from medalign.data.samples import values
from medalign.data.samples.bad_sample import BadSample
from medalign.data.samples.image_tags import strip_tags
from medalign.data.samples.sample import REPORT_PROMPT
from medalign.data.shards.index import ShardIndex
from medalign.decoding.base import Decoding, Method, Prepared, setting
from medalign.decoding.caption_heads import FOLDS, CaptionHeads, find_heads, questions, read_pairs
from medalign.errors import ConfigError
from medalign.student.capture import Output, intervening
from medalign.student.families.base import ModelSpec
from medalign.student.model import Student


@dataclass(frozen=True)
class CAI(Method):
    """What a request for a description changes in the heads that respond to it is added to them for every question.

    Attributes:
        found: the heads and shifts, see `prepare`.
        fingerprint: of the shards.
    """

    name: ClassVar[str] = "cai"

    shards: str = setting("", "folder of shards with questions about images, from which the heads are found")
    alpha: float = setting(1.0, "weight of the shift; not published", least=-1000, most=1000)
    share: float = setting(
        48 / 1024, "share of all heads that are shifted, at least one; not published", least=0, most=1
    )
    images: int = setting(64, "images that are read to find the heads; not published", least=2 * FOLDS)
    request: str = setting(REPORT_PROMPT, "the request for a description; not published")
    found: CaptionHeads | None = field(default=None, compare=False, repr=False)
    fingerprint: tuple[str, ...] = field(default=(), compare=False, repr=False)

    def check(self, spec: ModelSpec, config: StudentConfig) -> None:
        """Refuse shards with too few questions."""
        if find_spec("sklearn") is None:
            raise ConfigError("scikit-learn is not installed; install it with: pip install 'medalign[cai]'")
        if not self.shards:
            raise ConfigError(
                f"{self.option('shards')} is missing; name a folder of shards with questions about images, other ones "
                "than those that are asked, such as the training set"
            )
        try:
            text, places = strip_tags(self.request)
        except BadSample:  # the image token of another model
            text, places = self.request, 1
        if places or not text.strip() or values.fault(text):
            raise ConfigError(
                f"{self.option('request')} is {self.request!r}; write a request for a description of an image, without "
                "a place for the image"
            )
        self._require(len(questions(ShardIndex.open(self.shards))), "questions about images")

    def prepare(self, student: Student, collator: Collator) -> Self:
        """Find the heads and the shifts."""
        index = ShardIndex.open(self.shards)
        pairs = read_pairs(index, collator, self.request, self.images)
        self._require(sum(len(pair.question.input_ids) for pair in pairs), "different images with a question")
        return replace(self, found=find_heads(student, pairs, self.share), fingerprint=index.fingerprint())

    @contextmanager
    def applied(self, student: Student, batch: Batch, decoding: Decoding) -> Iterator[Prepared]:
        """Shift the outputs of the heads in the rows of samples with an image."""
        if self.found is None:
            raise ConfigError("--decoding cai has found no heads yet; call `Decoding.prepare` before")
        has_image_B = (batch.image_index >= 0).any(1)
        heads = {}
        for block in {block for block, _ in self.found.places}:
            shift_HD = torch.zeros_like(self.found.shifts[block])
            chosen = [head for each, head in self.found.places if each == block]
            shift_HD[chosen] = self.alpha * self.found.shifts[block][chosen]
            heads[student.spec.attentions[block]] = ShiftedHeads(shift_HD.to(has_image_B.device), has_image_B)
        with intervening(heads):
            yield Prepared(batch)

    @property
    def learned_from(self) -> tuple[str, ...]:
        """See `Method.learned_from`."""
        return self.fingerprint

    def describe(self) -> dict[str, Any]:
        """Return the settings; once the heads are found, with them, and with the shards' content for their place."""
        if self.found is None:
            return super().describe()
        heads = [list(place) for place in self.found.places]
        return super().describe() | {"decoding.shards": list(self.fingerprint), "decoding.heads": heads}

    def _require(self, count: int, of: str) -> None:
        if count < 2 * FOLDS:
            raise ConfigError(f"{self.shards} has {count} {of}, and {2 * FOLDS} are needed; name other shards")
        if count < self.images:
            raise ConfigError(
                f"{self.option('images')} is {self.images}, but {self.shards} has {count} {of}; choose at most that "
                "many, or other shards"
            )


class ShiftedHeads:
    """Adds to the outputs of a block's heads in the last row of each pass.

    Args:
        shift_HD: what is added, zeros for heads that are not shifted.
        has_image_B: whether a sample has an image; the others are not changed.
    """

    def __init__(self, shift_HD: torch.Tensor, has_image_B: torch.Tensor) -> None:
        self._shift_BHD = shift_HD * has_image_B[:, None, None]

    def __call__(self, attend: Any, module: nn.Module, /, *inputs: Any, **kwargs: Any) -> Output:
        """Call the backend and shift its last row."""
        output_RLHD, weights = attend(module, *inputs, **kwargs)
        rows = len(output_RLHD)
        if rows > len(self._shift_BHD):  # the beams of a sample are consecutive rows
            self._shift_BHD = self._shift_BHD.repeat_interleave(rows // len(self._shift_BHD), dim=0)
        output_RLHD[:, -1] += self._shift_BHD.to(output_RLHD.dtype)
        return output_RLHD, weights
