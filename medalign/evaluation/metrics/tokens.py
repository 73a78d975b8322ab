"""Texts as tokens, in every script: what ROUGE-L, BLEU and the scores of short answers count.

Scripts that put no spaces between words (Chinese, Japanese, Thai and others) are counted by character, the way
sacrebleu's `zh` tokenizer counts Chinese; all others by word. A character is an extended grapheme cluster, so that
a vowel sign or a tone mark stays with its letter. English text gives the same tokens as the tokenizers of rouge-score
and sacrebleu (13a).
"""

from __future__ import annotations

import unicodedata

import regex

_SCRIPTS = (
    *("Hani", "Hira", "Kana", "Bopo"),  # Chinese, Japanese
    *("Thai", "Laoo", "Khmr", "Mymr", "Tale", "Talu", "Lana", "Tavt", "Java", "Bali"),  # South East Asia
)
UNSPACED = "".join(rf"\p{{scx={script}}}" for script in _SCRIPTS)  # the inside of a set: scripts without spaces

# What is not seen; the zero width space stays, because it separates words.
_INVISIBLE = regex.compile(r"(?V1)[\p{Default_Ignorable_Code_Point}--\u200B]+")
# Forms that differ in width or shape only: Roman numerals in one character, squared units, ligatures, Arabic
# presentation forms, full width, half width.
_FORMS = regex.compile(r"[\u2160-\u217F\u3300-\u33FF\uFB00-\uFFEF]+")
# ROUGE-L: no superscripts and fractions (\p{No}), which rouge-score's own tokenizer drops as well.
_ROUGE = regex.compile(
    rf"(?V1)(?=[[{UNSPACED}]&&[\p{{L}}\p{{M}}\p{{Nd}}\p{{Nl}}]])\X|[[\p{{L}}\p{{M}}\p{{Nd}}\p{{Nl}}]--[{UNSPACED}]]+"
)
# BLEU: what 13a leaves attached. Punctuation that all scripts share is left to 13a.
_ALONE = regex.compile(rf"(?V1)(?=[[{UNSPACED}]&&[\p{{L}}\p{{M}}\p{{N}}]])\X|[\p{{P}}--[\p{{scx=Zyyy}}\p{{scx=Latn}}]]")


def normalize(text: str) -> str:
    """The text in NFC, without invisible characters, in ordinary width: equal texts become equal strings."""
    text = _FORMS.sub(lambda found: unicodedata.normalize("NFKC", found[0]), _INVISIBLE.sub("", text))
    return unicodedata.normalize("NFC", text)


def rouge_tokens(text: str) -> list[str]:
    """Lower-cased words and characters for ROUGE-L. A text that has neither (":-)") is one token."""
    text = normalize(text).lower()
    return _ROUGE.findall(text) or ([text.strip()] if text.strip() else [])


def separate(text: str) -> str:
    """The text with spaces around what sacrebleu's 13a tokenizer does not separate.

    These are the characters of scripts without spaces, and the punctuation of single scripts, such as the Arabic
    comma and the danda of Hindi.
    """
    return _ALONE.sub(r" \g<0> ", normalize(text))


def separable(text: str) -> bool:
    """Whether `separate` puts anything apart."""
    return _ALONE.search(normalize(text)) is not None
