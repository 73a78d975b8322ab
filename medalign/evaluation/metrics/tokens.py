"""Tokenization of text in any script for ROUGE-L, BLEU and the scores of short answers.

Scripts without spaces between words (Chinese, Japanese, Thai and others) are split into characters, as sacrebleu's
`zh` tokenizer does for Chinese. All other scripts are split into words. A character is an extended grapheme cluster,
so that a vowel sign or a tone mark stays with its letter. English text yields the same tokens as the tokenizers of
rouge-score and sacrebleu (13a).
"""

from __future__ import annotations

import unicodedata

import regex

_SCRIPTS = (
    *("Hani", "Hira", "Kana", "Bopo"),  # Chinese, Japanese
    *("Thai", "Laoo", "Khmr", "Mymr", "Tale", "Talu", "Lana", "Tavt", "Java", "Bali"),  # South East Asia
)
UNSPACED = "".join(rf"\p{{scx={script}}}" for script in _SCRIPTS)  # content of a character set: scripts without spaces

# Invisible characters, except the zero-width space, which separates words.
_INVISIBLE = regex.compile(r"(?V1)[\p{Default_Ignorable_Code_Point}--\u200B]+")
# Characters that differ from others only in width or shape: single-character Roman numerals, squared units, ligatures,
# Arabic presentation forms, full width, half width.
_FORMS = regex.compile(r"[\u2160-\u217F\u3300-\u33FF\uFB00-\uFFEF]+")
# ROUGE-L: without superscripts and fractions (\p{No}), which the tokenizer of rouge-score removes as well.
_ROUGE = regex.compile(
    rf"(?V1)(?=[[{UNSPACED}]&&[\p{{L}}\p{{M}}\p{{Nd}}\p{{Nl}}]])\X|[[\p{{L}}\p{{M}}\p{{Nd}}\p{{Nl}}]--[{UNSPACED}]]+"
)
# BLEU: characters that 13a does not separate. Punctuation that all scripts share is left to 13a.
_SPLIT = regex.compile(rf"(?V1)(?=[[{UNSPACED}]&&[\p{{L}}\p{{M}}\p{{N}}]])\X|[\p{{P}}--[\p{{scx=Zyyy}}\p{{scx=Latn}}]]")


def normalize(text: str) -> str:
    """Return the text in NFC, without invisible characters and width variants, so that equal texts compare equal."""
    text = _FORMS.sub(lambda found: unicodedata.normalize("NFKC", found[0]), _INVISIBLE.sub("", text))
    return unicodedata.normalize("NFC", text)


def rouge_tokens(text: str) -> list[str]:
    """Split a text into lowercase words and characters for ROUGE-L. A text without either (":-)") is one token."""
    text = normalize(text).lower()
    return _ROUGE.findall(text) or ([text.strip()] if text.strip() else [])


def separate(text: str) -> str:
    """Put spaces around characters that sacrebleu's 13a tokenizer does not separate.

    These are the characters of scripts without spaces, and punctuation that only some scripts use, such as the Arabic
    comma and the danda of Hindi.
    """
    spaced: str = _SPLIT.sub(r" \g<0> ", normalize(text))
    return spaced


def separable(text: str) -> bool:
    """Return whether `separate` would separate any character of the text."""
    return _SPLIT.search(normalize(text)) is not None
