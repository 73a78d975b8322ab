"""The student's chat template and tokenizer combined: prompts and conversations as token ids.

A conversation is rendered and tokenized in one piece, so its ids are those that the model was trained on. The ids of
the prompt must be a prefix; the model learns the ids that follow.
"""

from __future__ import annotations

import re
from typing import Any

from medalign.contracts import ImageTokens
from medalign.data.batches.spelling import Speller
from medalign.data.samples.faults import as_bad_sample
from medalign.data.samples.sample import BadSample
from medalign.data.samples.values import MARKS
from medalign.errors import ConfigError

PROBE = "probe"
_ANSWER = "zanswerz"
_MARKER = re.compile(r"<[^<>\s]+>|\[/?[A-Z_]+\]")  # what templates write for a token: <|im_end|>, </s>, [/INST]
_ANSWERS = (_ANSWER, "Yes", "1")  # a prompt must not merge with answers that begin like these


class Conversation:
    """A question about images and its answer, written by the student's own template and tokenizer.

    Args:
        processor: the student's processor or tokenizer, with a chat template that takes lists of typed content.
        image: how an image is written.

    Raises:
        ConfigError: template, tokenizer and image token do not fit together.
    """

    def __init__(self, processor: Any, image: ImageTokens) -> None:
        self.tokenizer: Any = getattr(processor, "tokenizer", processor)
        self._image_token_id = image.token_id
        self._image_text = image.text
        # The texts of users are marked, so that a marker in them is not taken for an image.
        self._marker = re.compile(f"(?<!{MARKS[0]}){re.escape(image.marker)}") if image.marker else None
        owners = (processor, self.tokenizer)
        self._renderer: Any = next((o for o in owners if getattr(o, "chat_template", None)), None)
        if self._renderer is None:
            raise ConfigError(
                "the student's processor and tokenizer have no chat template; add chat_template.jinja to the model's "
                "folder, or set tokenizer.chat_template and save it"
            )
        if self.tokenizer.eos_token_id is None:
            raise ConfigError("the student's tokenizer has no eos_token, which ends an answer; set it and save it")
        bos = self.tokenizer.bos_token_id
        # Some tokenizers begin every text with BOS; a template that writes BOS itself gets no second one.
        self._bos = [bos] if bos is not None and self.tokenizer(PROBE)["input_ids"][:1] == [bos] else []
        prompt, whole = self._probe_texts()
        self._speller = Speller(self.tokenizer, prompt + whole)
        self._special_ids = {*self._speller.special.values()} - {self.tokenizer.unk_token_id} | {image.token_id}
        self._written: dict[tuple[int, bool, bool], list[int]] = {}  # special tokens that the template writes, by form
        self._probe_image(prompt)
        self._after, end = self._end_of_turn(whole)
        self._ends_itself = end is not None
        self.end_token_id: int = self.tokenizer.eos_token_id if end is None else end  # ends an answer
        self._probe_answers()

    def prompt(self, images: int, question: str) -> list[int]:
        """Return the ids up to the answer, with one image token per image.

        Raises:
            BadSample: the template or the tokenizer rejects the text.
        """
        return self._checked(images, question, None)

    def answer(self, prompt: list[int], images: int, question: str, answer: str) -> list[int]:
        """Return the ids that follow the prompt if `answer` is given, including the end of the turn.

        Args:
            prompt: the ids of the prompt.
            images: number of images.
            question: the question of this prompt.
            answer: the answer.

        Raises:
            BadSample: there are no such ids, or they cannot be separated from those of the prompt.
        """
        answer = answer.strip()
        whole = self._checked(images, question, answer) if answer else prompt
        if whole[: len(prompt)] != prompt:
            raise BadSample(
                f"the tokenizer merges the beginning of the answer {answer[:20]!r} into the end of the prompt; begin "
                "the answer with a letter or a digit"
            )
        ids = whole[len(prompt) :]
        if len(ids) <= self._ends_itself:
            raise BadSample(f"answer {answer!r} has no token to learn from")
        return ids if self._ends_itself else [*ids, self.end_token_id]

    def _checked(self, images: int, question: str, answer: str | None) -> list[int]:
        """Return the ids. Raises BadSample if they contain special tokens that the template did not write."""
        form = images, bool(question), answer is not None
        if form not in self._written:
            probe = self._ids(images, question and PROBE, answer and _ANSWER)
            self._written[form] = self._special(probe)
        found, written = self._special(ids := self._ids(images, question, answer)), self._written[form]
        rendered = written.count(self._image_token_id)
        if rendered != images:
            raise BadSample(f"the chat template renders {rendered} image tokens for a sample with {images} images")
        if found != written:
            odd = next((token for token in found if found.count(token) != written.count(token)), found[0])
            raise BadSample(
                f"the tokenizer reads {self.tokenizer.convert_ids_to_tokens(odd)!r} in the text as a special token "
                "and cannot spell it; remove it from the text"
            )
        return ids

    def _special(self, ids: list[int]) -> list[int]:
        return [token for token in ids if token in self._special_ids]

    def _ids(self, images: int, question: str, answer: str | None = None) -> list[int]:
        """Ids of a prompt, or of a conversation up to the end of its turn if there is an answer."""
        mark = self._speller.mark
        marked = mark(question), None if answer is None else mark(answer)
        with as_bad_sample("the chat template rejects the text"):
            text = self._render(images, *marked)
        if answer is not None:
            if not text.endswith(self._after):
                raise BadSample(f"the chat template does not end this conversation with {self._after!r}")
            text = text.removesuffix(self._after)
        ids = self._speller.encode(text)
        return ids if ids[:1] == self._bos else [*self._bos, *ids]

    def _render(self, images: int, question: str, answer: str | None = None) -> str:
        content = [*({"type": "image"} for _ in range(images)), {"type": "text", "text": question}]
        turns: list[dict[str, Any]] = [{"role": "user", "content": content}]
        if answer is not None:
            turns.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
        text = self._renderer.apply_chat_template(turns, tokenize=False, add_generation_prompt=answer is None)
        # The text around an image is written before the text is tokenized: its line ends may merge with others.
        return self._marker.sub(lambda _: self._image_text, text) if self._marker else text

    def _probe_texts(self) -> tuple[str, str]:
        """Render a prompt and its conversation."""
        try:
            with as_bad_sample("the chat template does not accept image and text content"):
                prompt = self._render(1, PROBE)
            with as_bad_sample("the chat template does not accept an assistant's turn"):
                return prompt, self._render(1, PROBE, _ANSWER)
        except BadSample as error:
            raise ConfigError(f"{error}; change chat_template.jinja in the student's folder") from error

    def _probe_image(self, prompt: str) -> None:
        """Require that an image is rendered as one image token, with a question after it."""
        ids = self._speller.encode(prompt)
        found = ids.count(self._image_token_id)
        token = self.tokenizer.convert_ids_to_tokens(self._image_token_id)
        if found != 1:
            fault = "none" if found == 0 else f"{found} (it is already expanded)"
            raise ConfigError(
                f"the chat template must render one image token {token!r} (id {self._image_token_id}) per image; "
                f"it renders {fault}, in {prompt[:200]!r}"
            )
        if PROBE not in prompt or ids[-1] == self._image_token_id:
            raise ConfigError(f"the chat template puts no question after the image: {prompt[:200]!r}")

    def _end_of_turn(self, whole: str) -> tuple[str, int | None]:
        """Return the text that follows the end of an answer, and the special token that ends it, or None."""
        _, found, tail = whole.rpartition(_ANSWER)
        if not found:
            raise ConfigError(f"the chat template omits the assistant's answer: {whole[:200]!r}")
        end = self._speller.first(tail)
        if unknown := _MARKER.search(tail[: end.start()] if end else tail):
            raise ConfigError(
                f"the chat template ends an answer with {unknown.group()!r}, which is not a token of the tokenizer: "
                "the model would not learn to end so. Add it to the tokenizer as a special token, or write its "
                f"own ({self.tokenizer.eos_token!r}) in chat_template.jinja"
            )
        return (tail, None) if end is None else (tail[end.end() :], self._speller.special[end[0]])

    def _probe_answers(self) -> None:
        """Require that the ids of a prompt are a prefix of its conversation."""
        prompt = self._ids(1, PROBE)
        for answer in _ANSWERS:
            whole = self._ids(1, PROBE, answer)
            if whole[: len(prompt)] == prompt:
                continue
            same = next(n for n in range(len(prompt)) if whole[n : n + 1] != prompt[n : n + 1])
            ends, continues = (self.tokenizer.decode(ids[same : same + 4]) for ids in (prompt, whole))
            raise ConfigError(
                f"the student's prompt is not the beginning of its conversation: after {same} tokens the prompt has "
                f"{ends!r}, the conversation {continues!r}. Change the chat template so that the generation prompt is "
                "the beginning of an assistant's turn, and does not end with a space ('ASSISTANT:', not 'ASSISTANT: ')"
            )
