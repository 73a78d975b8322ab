"""Tokenize rendered conversations. Special tokens are read in the template, and spelled out in the user's text.

A report may contain "</s>", and a question "<image>". `mark` encloses such text in two Unicode noncharacters before the
template is rendered, and `encode` spells out the enclosed text, in one piece with the text around it.
"""

from __future__ import annotations

import json
import re
from functools import cached_property
from typing import Any

from medalign.data.samples.faults import as_bad_sample
from medalign.data.samples.sample import BadSample
from medalign.data.samples.values import MARKS

_OPEN, _CLOSE = MARKS


class Speller:
    """Tokenizes text with a fast or a slow tokenizer of transformers.

    Args:
        tokenizer: the tokenizer of the student.
        written: a conversation rendered by the student's template. Added tokens that occur in it count as special even
            if they are not declared as special, as some tokenizers do with role markers. Other added tokens are
            ordinary vocabulary.
    """

    def __init__(self, tokenizer: Any, written: str) -> None:
        self._tokenizer = tokenizer
        added = {token.content: (token_id, token.special) for token_id, token in tokenizer.added_tokens_decoder.items()}
        read = set(tokenizer(written, add_special_tokens=False)["input_ids"])
        named = {token: (tokenizer.convert_tokens_to_ids(token), True) for token in tokenizer.all_special_tokens}
        self.special: dict[str, int] = {  # text of each special token -> id
            text: token_id
            for text, (token_id, special) in (added | named).items()
            if special or (token_id in read and not text.isspace())
        }
        longest_first = sorted(filter(None, self.special), key=len, reverse=True)
        self._token = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        self._marked_or_token = re.compile(f"{_OPEN}(.*?){_CLOSE}|({self._token.pattern})", re.DOTALL)

    def mark(self, text: str) -> str:
        """Mark the special tokens in a user's text. Most texts contain none and are returned unchanged.

        Raises:
            BadSample: the text contains one of the marks.
        """
        for mark in (_OPEN, _CLOSE):
            if mark in text:
                raise BadSample(f"the text contains U+{ord(mark):04X}, which is not a valid character; remove it")
        return self._token.sub(rf"{_OPEN}\g<0>{_CLOSE}", text)

    def first(self, text: str) -> re.Match[str] | None:
        """Return the first special token in a text of the template."""
        return self._token.search(text)

    def encode(self, text: str) -> list[int]:
        """Return the ids of a rendered text. Raises BadSample if the tokenizer rejects it."""
        with as_bad_sample("the student's tokenizer cannot read the text"):
            if _OPEN not in text:
                # verbose=False suppresses warnings about texts that exceed the length of the model; they are cut later.
                return list(self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
            return self._encode_fast(text) if self._tokenizer.is_fast else self._encode_slow(text)

    def _encode_fast(self, text: str) -> list[int]:
        twin, original = self._twin
        renamed = self._marked_or_token.sub(lambda m: m[1] if m[2] is None else _alias(self.special[m[2]]), text)
        return [original.get(token, token) for token in twin.encode(renamed, add_special_tokens=False).ids]

    @cached_property
    def _twin(self) -> tuple[Any, dict[int, int]]:
        """The tokenizer with renamed special tokens, and a map from its ids to the original ids of added tokens.

        It does not recognize the original text of a special token, so a user's "</s>" is spelled out.
        """
        backend = self._tokenizer.backend_tokenizer
        state = json.loads(backend.to_str()) | {"post_processor": None, "truncation": None, "padding": None}
        for token in state["added_tokens"]:
            if token["content"] in self.special:
                token["content"] = _alias(token["id"])
        twin = type(backend).from_str(json.dumps(state))
        return twin, {twin.token_to_id(token["content"]): token["id"] for token in state["added_tokens"]}

    def _encode_slow(self, text: str) -> list[int]:
        """Tokenize the runs between special tokens separately, as slow tokenizers do."""
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
