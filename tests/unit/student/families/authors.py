"""Small models in the layout of LLaVA's authors, with the file and weight names that are published."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from tests import mistral

TOWER = "vit/clip_tiny"
NAMES = (  # of transformers -> of the authors
    (r"^model\.multi_modal_projector\.linear_1\.", "model.mm_projector.0."),
    (r"^model\.multi_modal_projector\.linear_2\.", "model.mm_projector.2."),
    (r"^model\.vision_tower\.", "model.vision_tower.vision_tower.vision_model."),
    (r"^model\.language_model\.", "model."),
)
# Templates of the language models that these students were trained from. They take text, not lists of parts.
MISTRAL_INSTRUCT = (
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token}}{% else %}"
    "{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
VISION = CLIPVisionConfig(
    hidden_size=24, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8
)


def save_llava_med(folder: Path) -> Path:
    """LLaVA-Med 1.5: Mistral's real vocabulary in tokenizer.model, and a tower that the folder does not describe."""
    save_sentencepiece(folder)
    text = MistralConfig(vocab_size=32000, sliding_window=None, rope_theta=1e6, bos_token_id=1, eos_token_id=2, **SIZES)
    return _save(folder, text, "llava_mistral", "openai/clip-tiny", rope_theta=1e6)


def save_llava_llama(folder: Path) -> Path:
    """LLaVA 1.5, here with the vocabulary of Mistral, and a tower in the folder."""
    save_sentencepiece(folder)
    text = LlamaConfig(vocab_size=32000, bos_token_id=1, eos_token_id=2, **SIZES)
    return _save(folder, text, "llava_llama", TOWER)


def save_sentencepiece(folder: Path) -> None:
    """Mistral's real vocabulary, as a tokenizer.model without a tokenizer.json."""
    model = mistral.sentencepiece_model()
    folder.mkdir(parents=True)
    shutil.copy(model, folder / "tokenizer.model")
    settings = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    settings |= {"chat_template": MISTRAL_INSTRUCT}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def save_huatuo(folder: Path) -> Path:
    """HuatuoGPT-Vision-7B: a byte-level tokenizer.json, and the tower in a folder of its own, with a pickle."""
    folder.mkdir(parents=True)
    save_tokenizer(folder)
    text = Qwen2Config(vocab_size=264, bos_token_id=256, eos_token_id=256, rope_theta=1e6, **SIZES)
    _save(folder, text, "llava_qwen2", f"./{TOWER}", rope_theta=1e6)
    torch.save(CLIPVisionModel(VISION).state_dict(), folder / TOWER / "pytorch_model.bin")
    return folder


def save_tokenizer(folder: Path) -> None:
    """A tokenizer of Qwen2's kind that knows bytes only."""
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({token: i for i, token in enumerate(alphabet)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(specials)
    PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=specials[0], pad_token=specials[0]).save_pretrained(
        folder
    )
    settings = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": specials[0], "pad_token": specials[0]}
    settings |= {"chat_template": CHATML}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
}


def _save(folder: Path, text: PreTrainedConfig, kind: str, tower: str, **flat: Any) -> Path:
    torch.manual_seed(0)
    config = LlavaConfig(vision_config=VISION, text_config=text, tie_word_embeddings=False)
    model = LlavaForConditionalGeneration(config)
    with torch.no_grad():  # sharper than the default start, so that attention and answers are not all alike
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.mul_(4.0 if "proj" in name else 2.0)
    state = {}
    for name, value in model.state_dict().items():
        for pattern, written in NAMES:
            name, found = re.subn(pattern, written, name)
            if found:
                break
        state[name] = value.contiguous()
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    kept = {name: value for name, value in text.to_dict().items() if not isinstance(value, dict | list)}
    flat |= {"model_type": kind, "mm_vision_tower": tower, "mm_projector_type": "mlp2x_gelu", "mm_hidden_size": 24}
    flat |= {"mm_vision_select_feature": "patch", "mm_vision_select_layer": -2, "image_aspect_ratio": "pad"}
    flat |= {"mm_use_im_start_end": False, "architectures": ["LlavaForCausalLM"], "torch_dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(kept | flat))
    ends = {"bos_token_id": text.bos_token_id, "eos_token_id": text.eos_token_id}
    (folder / "generation_config.json").write_text(json.dumps(ends))
    (folder / TOWER).mkdir(parents=True)
    CLIPConfig(vision_config=VISION.to_dict()).save_pretrained(folder / TOWER)
    size = {"height": 32, "width": 32}
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=size).save_pretrained(folder / TOWER)
    return folder
