"""Tokenize the text of a sample with the model's own chat template, and compute its labels and masks.

The sequence of a sample consists of the template up to the question, each image as a run of image tokens, the question,
the template up to the answer, the answer, and the token that ends its turn. Only the last two are supervised.
Positions are derived from token ids, never from counts of characters or words.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from medalign.contracts import IGNORE, ImageTokens, Sample
from medalign.data.batches.conversation import Conversation
from medalign.data.samples.faults import as_bad_sample
from medalign.data.samples.sample import BadSample, sample_context
from medalign.errors import ConfigError


@dataclass(frozen=True)
class Encoded:
    """One sample as tokens; lists of equal length."""

    input_ids: list[int]
    labels: list[int]  # IGNORE outside the answer
    question_mask: list[bool]  # prompt tokens after the last image token; all False without an image
    image_index: list[int]  # index of the image within the sample at its image tokens, -1 elsewhere
    cells: list[bool]  # image tokens that are cells of the grid
    question_cut: int = 0  # tokens of the question that were cut to the length limit
    answer_cut: int = 0  # tokens of the answer and its end that were cut to the length limit

    @property
    def truncated(self) -> bool:
        """Whether the text was cut to the length limit."""
        return self.question_cut + self.answer_cut > 0


def pad_token_id(tokenizer: Any) -> int:
    """Return the padding token of a tokenizer, or its end-of-sequence token if there is none."""
    pad = tokenizer.pad_token_id
    token: int = tokenizer.eos_token_id if pad is None else pad
    return token


class PromptEncoder:
    """Tokenizes samples for one student.

    Args:
        processor: the student's processor or tokenizer, with a chat template that takes lists of typed content.
        image: how an image is written.
        max_length: maximum number of tokens, including image tokens.
        max_images: largest number of images in a sample; max_length must have room for them.
        setting: the user's name of max_length, for error messages.

    Raises:
        ConfigError: template, tokenizer, image token and length limit do not fit together.
    """

    def __init__(
        self,
        processor: Any,
        *,
        image: ImageTokens,
        max_length: int,
        max_images: int = 1,
        setting: str = "data.max_length",
    ) -> None:
        try:
            with as_bad_sample("the student's tokenizer rejects what its chat template renders"):
                self._conversation = Conversation(processor, image)
        except BadSample as error:
            raise ConfigError(f"{error}; correct tokenizer.json or chat_template.jinja in its folder") from error
        self.tokenizer: Any = self._conversation.tokenizer
        self.image = image
        self.max_length = max_length
        self._setting = setting
        self._probe_images(max_images)

    @property
    def pad_token_id(self) -> int:
        """The token for padding."""
        return pad_token_id(self.tokenizer)

    @property
    def end_token_id(self) -> int:
        """The token that ends an answer: that of the template, or the tokenizer's end-of-sequence token."""
        return self._conversation.end_token_id

    def encode(self, sample: Sample, *, with_answer: bool) -> Encoded:
        """Tokenize a sample and cut it to the limit.

        The answer is cut first, from its end, to one token at least; then the question is cut.

        Args:
            sample: the sample.
            with_answer: whether the answer is appended.

        Raises:
            BadSample: the text cannot be used.
            ConfigError: the limit has no room for any text.
        """
        room = self.max_length - with_answer
        question, images = sample.question, len(sample.images)
        with sample_context(f"{sample.shard}/{sample.key}"):
            prompt = self._conversation.prompt(images, question)
            whole = self._length(prompt)
            if whole > room:
                question, prompt = self._cut_question(sample, room)
            answer = self._conversation.answer(prompt, images, question, sample.answer) if with_answer else []
        length = self._length(prompt)
        return self._spans(prompt, answer, keep=self.max_length - length, question_cut=whole - length)

    def _spans(self, prompt: list[int], answer: list[int], keep: int, question_cut: int) -> Encoded:
        ids: list[int] = []
        image_index: list[int] = []
        cells: list[bool] = []
        images = after_image = 0
        run = self.image.cells or (True,) * self.image.count
        for token in prompt:
            is_image = token == self.image.token_id
            count = len(run) if is_image else 1
            ids += [token] * count
            image_index += [images if is_image else -1] * count
            cells += run if is_image else (False,)
            if is_image:
                images, after_image = images + 1, len(ids)
        question = [images > 0 and i >= after_image for i in range(len(ids))]
        kept = answer[:keep]
        return Encoded(
            input_ids=ids + kept,
            labels=[IGNORE] * len(ids) + kept,
            question_mask=question + [False] * len(kept),
            image_index=image_index + [-1] * len(kept),
            cells=cells + [False] * len(kept),
            question_cut=question_cut,
            answer_cut=len(answer) - len(kept),
        )

    def _cut_question(self, sample: Sample, room: int) -> tuple[str, list[int]]:
        """Longest prefix of the question that fits, found by bisection over its characters, and its prompt."""
        images = len(sample.images)
        kept, best = "", self._conversation.prompt(images, "")
        if self._length(best) > room:
            raise ConfigError(
                f"{self._setting} is {self.max_length}, but the template and {images} images with "
                f"{self.image.count} tokens each take {self._length(best)} ({sample.shard}/{sample.key}); raise it"
            )
        fits, longest = 0, len(sample.question)
        while fits < longest:
            middle = (fits + longest + 1) // 2
            question = sample.question[:middle].rstrip()
            ids = self._conversation.prompt(images, question)
            if self._length(ids) <= room:
                fits, kept, best = middle, question, ids
            else:
                longest = middle - 1
        return kept, best

    def _length(self, prompt: list[int]) -> int:
        return len(prompt) + prompt.count(self.image.token_id) * (self.image.count - 1)

    def _probe_images(self, images: int) -> None:
        """Require that the template renders this number of images, and that they leave room for text."""
        try:
            empty = self._length(self._conversation.prompt(images, ""))
        except BadSample as error:
            raise ConfigError(f"{error}; change the template, or pack samples with one image") from error
        if empty >= self.max_length:
            subject = "one image with" if images == 1 else f"the {images} images of the largest sample with"
            each = "" if images == 1 else " each"
            raise ConfigError(
                f"{self._setting} is {self.max_length}, but the template and {subject} {self.image.count} "
                f"tokens{each} take {empty}; raise it to more than {empty}"
            )
