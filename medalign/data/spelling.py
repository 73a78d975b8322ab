"""Rendered conversations as token ids: the template's special tokens are read, those in a user's text are spelled.

A report may hold "</s>", a question "<image>". `mark` puts such places between two noncharacters of Unicode before the
template is rendered, and `encode` spells what stands between them, in one piece with the text around it.
"""

from __future__ import annotations

import json
import re
from functools import cached_property
from typing import Any

from medalign.data.samples import BadSample
from medalign.data.values import MARKS

_OPEN, _CLOSE = MARKS


class Speller:
    """Text to ids, for a fast or a slow tokenizer of transformers.

    Args:
        tokenizer: the student's.
        written: a conversation as the student's template renders it. Added tokens that are not special but are read
            in it (some tokenizers add their role markers so) count as special; other added words are vocabulary.
    """

    def __init__(self, tokenizer: Any, written: str) -> None:
        self._tokenizer = tokenizer
        added = {token.content: (number, token.special) for number, token in tokenizer.added_tokens_decoder.items()}
        read = set(tokenizer(written, add_special_tokens=False)["input_ids"])
        named = {token: (tokenizer.convert_tokens_to_ids(token), True) for token in tokenizer.all_special_tokens}
        self.special: dict[str, int] = {  # text of each special token, with its id
            text: number
            for text, (number, special) in (added | named).items()
            if special or (number in read and not text.isspace())
        }
        longest_first = sorted(filter(None, self.special), key=len, reverse=True)
        self._token = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        self._marked_or_token = re.compile(f"{_OPEN}(.*?){_CLOSE}|({self._token.pattern})", re.DOTALL)

    def mark(self, text: str) -> str:
        """A user's text with its special tokens marked; most texts have none and stay as they are.

        Raises BadSample for a text that holds one of the marks.
        """
        for mark in (_OPEN, _CLOSE):
            if mark in text:
                raise BadSample(f"the text holds U+{ord(mark):04X}, which Unicode keeps from texts; remove it")
        return self._token.sub(rf"{_OPEN}\g<0>{_CLOSE}", text)

    def first(self, text: str) -> re.Match[str] | None:
        """The first special token in a text of the template's own."""
        return self._token.search(text)

    def encode(self, text: str) -> list[int]:
        """Ids of a rendered text. Raises BadSample where the tokenizer cannot take it."""
        try:
            if _OPEN not in text:
                # Not verbose: it would warn of texts that are too long for the model, which are cut later.
                return list(self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
            return self._encode_fast(text) if self._tokenizer.is_fast else self._encode_slow(text)
        except (TypeError, ValueError) as error:
            raise BadSample(f"the student's tokenizer cannot read the text ({error})") from error

    def _encode_fast(self, text: str) -> list[int]:
        twin, original = self._twin
        plain = self._marked_or_token.sub(lambda m: m[1] if m[2] is None else _alias(self.special[m[2]]), text)
        return [original.get(token, token) for token in twin.encode(plain, add_special_tokens=False).ids]

    @cached_property
    def _twin(self) -> tuple[Any, dict[int, int]]:
        """The tokenizer with its special tokens under other names, and its ids for the added tokens' own.

        A special token's own text means nothing to it, so that a user's "</s>" is spelled in its place.
        """
        backend = self._tokenizer.backend_tokenizer
        state = json.loads(backend.to_str()) | {"post_processor": None, "truncation": None, "padding": None}
        for token in state["added_tokens"]:
            if token["content"] in self.special:
                token["content"] = _alias(token["id"])
        twin = type(backend).from_str(json.dumps(state))
        return twin, {twin.token_to_id(token["content"]): token["id"] for token in state["added_tokens"]}

    def _encode_slow(self, text: str) -> list[int]:
        """Slow tokenizers read the runs between special tokens one by one; so does this."""
        ids: list[int] = []
        run, marked, end = "", False, 0
        for found in self._marked_or_token.finditer(text):
            run, end = run + text[end : found.start()], found.end()
            if found[2] is None:
                run, marked = run + found[1], True
            else:
                ids += [*self._run(run, marked), self.special[found[2]]]
                run, marked = "", False
        return ids + self._run(run + text[end:], marked)

    def _run(self, text: str, marked: bool) -> list[int]:
        tokens = self._tokenizer.tokenize(text, split_special_tokens=marked) if text else []
        return list(self._tokenizer.convert_tokens_to_ids(tokens))


def _alias(token: int) -> str:
    return f"{_OPEN}{token}{_CLOSE}"
