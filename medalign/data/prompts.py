"""A sample's text as tokens, through the model's own chat template, with its label mask and spans.

The sequence of a sample: the template up to the question, each image as `tokens_per_image` image tokens, the question,
the template up to where the model speaks, then the answer and the end-of-sequence token. Only the last two are
supervised. Nothing is found by counting: positions come from token ids. Where the template writes something between
its prompt and an answer, such as a space, the answer's tokens begin with it: that is how the model knows them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError

from medalign.contracts import IGNORE, Sample
from medalign.data.samples import BadSample
from medalign.errors import ConfigError

_PROBE = "probe"


@dataclass(frozen=True)
class Encoded:
    """One sample as tokens; four lists of one length."""

    input_ids: list[int]
    labels: list[int]  # IGNORE outside the answer
    question_mask: list[bool]  # prompt tokens after the last image token; all False without an image
    image_index: list[int]  # number of the image within the sample at its tokens, -1 elsewhere
    truncated: bool  # the text was cut to the length limit


class PromptEncoder:
    """Samples to tokens for one student.

    Args:
        processor: the student's processor or tokenizer, with a chat template that takes lists of typed content.
        image_token_id: the id that stands for an image.
        tokens_per_image: N, image tokens of one image.
        max_length: longest sequence, image tokens included.
        most_images: images of the sample that has most; max_length must hold them.
        setting: what the user calls max_length, for errors.

    Raises ConfigError where template, image token and length limit do not fit together.
    """

    def __init__(
        self,
        processor: Any,
        *,
        image_token_id: int,
        tokens_per_image: int,
        max_length: int,
        most_images: int = 1,
        setting: str = "data.max_length",
    ) -> None:
        self.tokenizer: Any = getattr(processor, "tokenizer", processor)
        self.image_token_id = image_token_id
        self.tokens_per_image = tokens_per_image
        self.max_length = max_length
        self._setting = setting
        owners = (processor, self.tokenizer)
        self._renderer: Any = next((o for o in owners if getattr(o, "chat_template", None)), None)
        if self._renderer is None:
            raise ConfigError(
                "the student's processor and tokenizer have no chat template; add chat_template.jinja to the model's "
                "folder, or set tokenizer.chat_template and save it"
            )
        if self.tokenizer.eos_token_id is None:
            raise ConfigError("the student's tokenizer has no eos_token; answers could not end. Set it and save it")
        self._begins_with_bos = self._adds_bos()
        self._probe_template()
        self._probe_images(most_images)
        self._lead = self._before_answer()

    @property
    def pad_token_id(self) -> int:
        """The tokenizer's padding token, or its end-of-sequence token where it has none."""
        pad = self.tokenizer.pad_token_id
        return self.tokenizer.eos_token_id if pad is None else pad

    def encode(self, sample: Sample, *, with_answer: bool) -> Encoded:
        """The sample as tokens, cut to the limit: first the answer's end (one token stays), then the question's.

        Raises BadSample where the text cannot be used, ConfigError where the limit holds no text at all.
        """
        answer = self._answer_ids(sample) if with_answer else []
        room = self.max_length - min(len(answer), 1)
        prompt = self._prompt_ids(sample, sample.question)
        question_cut = self._length(prompt) > room
        if question_cut:
            prompt = self._cut_prompt(sample, room)
        kept = answer[: self.max_length - self._length(prompt)]
        return self._spans(prompt, kept, truncated=question_cut or len(kept) < len(answer))

    def _spans(self, prompt: list[int], answer: list[int], truncated: bool) -> Encoded:
        ids: list[int] = []
        image_index: list[int] = []
        images = after_image = 0
        for token in prompt:
            image = token == self.image_token_id
            count = self.tokens_per_image if image else 1
            ids += [token] * count
            image_index += [images if image else -1] * count
            if image:
                images, after_image = images + 1, len(ids)
        question = [images > 0 and i >= after_image for i in range(len(ids))]
        return Encoded(
            input_ids=ids + answer,
            labels=[IGNORE] * len(ids) + answer,
            question_mask=question + [False] * len(answer),
            image_index=image_index + [-1] * len(answer),
            truncated=truncated,
        )

    def _answer_ids(self, sample: Sample) -> list[int]:
        text = self._lead + sample.answer.strip() if sample.answer.strip() else ""
        ids = self._ids(text) if text else []
        if not ids:
            raise BadSample(f"{sample.shard}/{sample.key}: answer {sample.answer!r} has no token to learn from")
        if self.image_token_id in ids:
            raise BadSample(f"{sample.shard}/{sample.key}: the answer's text holds the image token")
        return [*ids, self.tokenizer.eos_token_id]

    def _prompt_ids(self, sample: Sample, question: str) -> list[int]:
        ids = self._tokenise(self._render(len(sample.images), question))
        if ids.count(self.image_token_id) != len(sample.images):
            raise BadSample(
                f"{sample.shard}/{sample.key}: {ids.count(self.image_token_id)} image tokens in the prompt for "
                f"{len(sample.images)} images; the question's text must not hold the image token"
            )
        return ids

    def _cut_prompt(self, sample: Sample, room: int) -> list[int]:
        """The prompt with as much of the question's beginning as fits, found by bisection over its characters."""
        best = self._prompt_ids(sample, "")
        if self._length(best) > room:
            raise ConfigError(
                f"{self._setting} is {self.max_length}, but the template and {len(sample.images)} images of "
                f"{self.tokens_per_image} tokens take {self._length(best)} ({sample.shard}/{sample.key}); raise it"
            )
        fits, longest = 0, len(sample.question)
        while fits < longest:
            middle = (fits + longest + 1) // 2
            ids = self._prompt_ids(sample, sample.question[:middle].rstrip())
            if self._length(ids) <= room:
                fits, best = middle, ids
            else:
                longest = middle - 1
        return best

    def _length(self, prompt: list[int]) -> int:
        return len(prompt) + prompt.count(self.image_token_id) * (self.tokens_per_image - 1)

    def _render(self, images: int, question: str, answer: str | None = None) -> str:
        content = [*({"type": "image"} for _ in range(images)), {"type": "text", "text": question}]
        turns: list[dict[str, Any]] = [{"role": "user", "content": content}]
        if answer is not None:
            turns.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
        return self._renderer.apply_chat_template(turns, tokenize=False, add_generation_prompt=answer is None)

    def _before_answer(self) -> str:
        """What the template writes between its generation prompt and an answer: often one space, or nothing."""
        prompt, answer = self._render(1, _PROBE), "zanswerz"
        try:
            whole = self._render(1, _PROBE, answer)
        except (TemplateError, TypeError) as error:
            raise ConfigError(f"the chat template does not take an assistant's turn: {error}") from error
        rest = whole.removeprefix(prompt)
        return rest[: rest.index(answer)] if rest != whole and answer in rest else ""

    def _tokenise(self, text: str) -> list[int]:
        ids = self._ids(text)
        bos = self.tokenizer.bos_token_id
        return [bos, *ids] if self._begins_with_bos and ids[:1] != [bos] else ids

    def _ids(self, text: str) -> list[int]:
        # Not verbose: it would warn of texts that are too long for the model, which are cut here.
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def _adds_bos(self) -> bool:
        """Whether the tokenizer begins every text with BOS; a template that writes it itself is left alone."""
        bos = self.tokenizer.bos_token_id
        return bos is not None and self.tokenizer(_PROBE)["input_ids"][:1] == [bos]

    def _probe_template(self) -> None:
        try:
            text = self._render(1, _PROBE)
        except (TemplateError, TypeError) as error:
            raise ConfigError(f"the chat template does not take image and text content: {error}") from error
        ids = self._tokenise(text)
        found = ids.count(self.image_token_id)
        token = self.tokenizer.convert_ids_to_tokens(self.image_token_id)
        if found != 1:
            fault = "none" if found == 0 else f"{found} of them: it is expanded already"
            raise ConfigError(
                f"the chat template must render one image token {token!r} (id {self.image_token_id}) for each image; "
                f"it renders {fault}, in {text[:200]!r}"
            )
        if _PROBE not in text or ids[-1] == self.image_token_id:
            raise ConfigError(f"the chat template puts no question after the image: {text[:200]!r}")

    def _probe_images(self, images: int) -> None:
        """Require that the template writes so many images, and that they leave room for text."""
        ids = self._tokenise(self._render(images, ""))
        found, empty = ids.count(self.image_token_id), self._length(ids)
        if found != images:
            raise ConfigError(
                f"the chat template renders {found} image tokens for a sample of {images} images; mend it, or pack "
                "samples of one image"
            )
        if empty >= self.max_length:
            shown = "one image" if images == 1 else f"the {images} images of the largest sample, each"
            raise ConfigError(
                f"{self._setting} is {self.max_length}, but the template and {shown} of {self.tokens_per_image} "
                f"tokens, take {empty}; raise it to more than {empty}"
            )
