"""Tokenizers whose ids are exactly those that a model was trained on, from folders without a processor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import LlamaTokenizer, PreTrainedTokenizerFast, Qwen2Tokenizer

from medalign.errors import ConfigError
from medalign.student.files import read_object
from medalign.student.reading import as_config_error

_IMAGE = "<image>"
_UNUSUAL = "\u2603\U0001f9ff\u1e9e"  # a tokenizer with bytes has an encoding for it


def is_bare_sentencepiece(folder: Path) -> bool:
    """Whether a folder has the tokenizer.model of a Llama-like tokenizer, and no tokenizer.json made from it."""
    if (folder / "tokenizer.json").is_file() or not (folder / "tokenizer.model").is_file():
        return False
    settings = folder / "tokenizer_config.json"
    kind = read_object(settings).get("tokenizer_class") if settings.is_file() else None
    return kind in (None, "LlamaTokenizer", "LlamaTokenizerFast")


def sentencepiece_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """Read a tokenizer.model of SentencePiece, as for Llama and Mistral.

    SentencePiece puts a space before every piece of text, also before one that follows a special token. transformers 5
    puts it before the first one only, unless the tokenizer is marked as a legacy one.

    Raises:
        ConfigError: the folder has no tokenizer.model.
    """
    _require(folder, "tokenizer.model")
    return _frozen(LlamaTokenizer.from_pretrained(folder, legacy=True, local_files_only=True))


def byte_level_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """Read a tokenizer.json of Qwen2. Raises ConfigError if the folder has none."""
    _require(folder, "tokenizer.json")
    return _frozen(Qwen2Tokenizer.from_pretrained(folder, local_files_only=True))


def reserve_image_token(tokenizer: Any, rows: int, folder: Path) -> int:
    """Choose the token that represents an image, without a new row in the embedding.

    It is `<image>` if the embedding has a row for it. Otherwise, it is the unknown token if the tokenizer never writes
    it because it spells unknown characters as bytes.

    Args:
        tokenizer: gets `<image>` as a special token if there is a row for it.
        rows: rows of the embedding.
        folder: the model's folder, for the error message.

    Returns:
        The id of the image token.

    Raises:
        ConfigError: there is no such token.
    """
    if _IMAGE not in tokenizer.get_vocab() and len(tokenizer) < rows:
        tokenizer.add_special_tokens({"additional_special_tokens": [_IMAGE]})
    image: int = tokenizer.get_vocab().get(_IMAGE, rows)
    if image < rows:
        return image
    unknown: int = tokenizer.unk_token_id
    used = {None, tokenizer.eos_token_id, tokenizer.bos_token_id}
    if unknown in used.union(tokenizer(_UNUSUAL, add_special_tokens=False)["input_ids"]):
        raise ConfigError(
            f"student.path {folder}: its embedding has {rows} rows, all of which its tokenizer uses, so there is none "
            "for the image token; resize the model (resize_token_embeddings) and save it"
        )
    return unknown


def chat_template(tokenizer: Any, folder: Path, default: str) -> Any:
    """Choose the chat template of a folder without a processor.

    It is that of chat_template.jinja or chat_template.json. Otherwise it is that of tokenizer_config.json if it takes
    images: that of the language model that the student was trained from takes text only, and is not used.

    Args:
        tokenizer: the tokenizer of the folder.
        folder: the model's folder.
        default: the template if the folder has none for images.

    Raises:
        ConfigError: chat_template.json has no template.
    """
    own = tokenizer.chat_template  # several by name, in some folders
    if (folder / "chat_template.jinja").is_file():
        return own
    if (path := folder / "chat_template.json").is_file():
        template = read_object(path).get("chat_template")
        if not isinstance(template, str):
            raise ConfigError(f'student.path {folder}: {path.name} has no text "chat_template"; correct or remove it')
        return template
    return own if own and _takes_images(tokenizer) else default


def _takes_images(tokenizer: Any) -> bool:
    """Whether the tokenizer's own template renders a list of typed content, and an image in it."""
    image, text = {"type": "image"}, {"type": "text", "text": "probe"}
    turns = [[{"role": "user", "content": content}] for content in ([image, text], [text])]
    try:
        with as_config_error("the tokenizer's chat template"):
            whole, words = (tokenizer.apply_chat_template(turn, tokenize=False) for turn in turns)
    except ConfigError:
        return False
    return whole != words and str(text) not in words  # some print the list as it is


def _require(folder: Path, name: str) -> None:
    if not (folder / name).is_file():
        raise ConfigError(f"student.path {folder}: {name} is missing; copy it from the model")


def _frozen(tokenizer: Any) -> PreTrainedTokenizerFast:
    """Wrap the tokenizer so that it stays as it is when it is saved and loaded again; padding is the end token."""
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer,
        bos_token=tokenizer.bos_token,
        eos_token=tokenizer.eos_token,
        unk_token=tokenizer.unk_token,
        pad_token=tokenizer.eos_token,
        chat_template=tokenizer.chat_template,
    )
