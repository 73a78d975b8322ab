"""A BERT as the text tower of a CLIP: BiomedCLIP's and UniMed-CLIP's, both a BiomedBERT (PubMedBERT)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import nn
from transformers import BertConfig, BertModel

from medalign.errors import CheckpointError
from medalign.teacher.weights import load_exactly

_HEADS = {768: 12, 1024: 16}  # of BiomedBERT-base and -large; the weights do not show the number of heads
# Kept by older versions of transformers, or not used by a tower that pools at the first token.
_IGNORED = ("transformer.embeddings.position_ids", "transformer.pooler.")


class BertTextTower(nn.Module):
    """A BERT and a projection into the space of images. Names are those of the published weights.

    Args:
        config: BERT's configuration.
        hidden: width between the two layers of the projection.
        width: e, width of the space of images.
    """

    def __init__(self, config: BertConfig, hidden: int, width: int) -> None:
        super().__init__()
        self.transformer = BertModel(config, add_pooling_layer=False)
        self.proj = nn.Sequential(
            nn.Linear(config.hidden_size, hidden, bias=False), nn.GELU(), nn.Linear(hidden, width, bias=False)
        )

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Embed token ids [n, L], of which those where the mask [n, L] is 0 are padding, as [n, e]."""
        embedded: torch.Tensor = self.proj(self.transformer(input_ids=ids, attention_mask=mask).last_hidden_state[:, 0])
        return embedded


def embed_with_bert(
    state: Mapping[str, torch.Tensor], prefix: str, file: Path, tokenizer: Tokenizer, texts: Sequence[str]
) -> torch.Tensor:
    """Build the tower from its weights and embed texts: float32 [n, e].

    Args:
        state: the weights of the whole model.
        prefix: name of the text tower inside the model.
        file: where the weights come from, for error messages.
        tokenizer: writes the start and the end token.
        texts: n texts.

    Raises:
        CheckpointError: the weights are not those of a BiomedBERT with a projection.
    """
    own = {key: value for key, value in state.items() if key.startswith(prefix)}
    own = {key: value for key, value in own.items() if not key.removeprefix(prefix).startswith(_IGNORED)}
    config = bert_config(own, prefix, file)
    first, last = (own[f"{prefix}proj.{number}.weight"] for number in (0, 2))
    tower = BertTextTower(config, first.shape[0], last.shape[0])
    load_exactly(tower, own, file, prefix=prefix, others=())
    encodings = tokenizer.encode_batch(list(texts))
    ids, mask = (torch.tensor([getattr(e, name) for e in encodings]) for name in ("ids", "attention_mask"))
    with torch.no_grad():
        embedded: torch.Tensor = tower.eval()(ids, mask)
        return embedded


def bert_config(own: Mapping[str, torch.Tensor], prefix: str, file: Path) -> BertConfig:
    """Read BERT's configuration from the shapes of its weights.

    Args:
        own: the weights of the text tower, with their prefix.
        prefix: name of the text tower inside the model.
        file: where the weights come from, for error messages.

    Raises:
        CheckpointError: they are not those of a BiomedBERT with a projection.
    """
    embeddings = f"{prefix}transformer.embeddings."
    needed = [f"{embeddings}{name}_embeddings.weight" for name in ("word", "position", "token_type")]
    needed += [
        f"{prefix}transformer.encoder.layer.0.intermediate.dense.weight",
        *(f"{prefix}proj.{i}.weight" for i in (0, 2)),
    ]
    if missing := [name for name in needed if name not in own]:
        raise CheckpointError(
            f"teacher weights {file} are not a BiomedBERT with a projection of two layers: {', '.join(missing)} "
            "missing; set teacher.text_weight to 0"
        )
    words, positions, types, inner = (own[name] for name in needed[:4])
    if words.shape[1] not in _HEADS:
        raise CheckpointError(
            f"teacher weights {file}: the text tower is {words.shape[1]} wide; supported are BiomedBERTs of width "
            f"{' or '.join(map(str, _HEADS))}; set teacher.text_weight to 0"
        )
    return BertConfig(
        vocab_size=words.shape[0],
        hidden_size=words.shape[1],
        max_position_embeddings=positions.shape[0],
        type_vocab_size=types.shape[0],
        intermediate_size=inner.shape[0],
        num_attention_heads=_HEADS[words.shape[1]],
        num_hidden_layers=len({key.split(".layer.")[1].split(".")[0] for key in own if ".layer." in key}),
    )
