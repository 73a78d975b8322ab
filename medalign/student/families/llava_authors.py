r"""LLaVA as its authors save it: LLaVA-Med 1.5, HuatuoGPT-Vision, and others trained with the code of LLaVA 1.5.

Their folders have no processor, no chat template for images, a flat config.json without that of the vision tower, and
other names of weights. They are read into the LLaVA class of transformers. The weights are not changed.

The prompts are those of the authors' code:

    LLaVA-Med 1.5       <s>[INST] <image>\\n{question} [/INST] {answer} </s>
    HuatuoGPT-Vision    <|user|>\\n<image>\\n{question}\\n<|assistant|>\\n{answer}<|endoftext|>
    LLaVA 1.5           <s>{system} USER: <image>\\n{question} ASSISTANT: {answer}</s>

What HuatuoGPT-Vision was taught as the end of an answer is not published; <|endoftext|> is where its generation stops.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

from transformers import (
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    MistralConfig,
    PreTrainedConfig,
    Qwen2Config,
)
from typing_extensions import override

from medalign.config import StudentConfig
from medalign.errors import ConfigError
from medalign.student.families.llava import Llava
from medalign.student.families.registry import register
from medalign.student.files import read_object
from medalign.student.tokenizers import (
    byte_level_tokenizer,
    chat_template,
    reserve_image_token,
    sentencepiece_tokenizer,
)
from medalign.student.towers import TOWER_KEYS, image_processor, tower_config, tower_name

_TEMPLATE = (
    "{{% for message in messages %}}{{% if message['role'] == 'user' %}}{user}{{% for part in message['content'] %}}"
    "{{% if part['type'] == 'image' %}}{image}\n{{% else %}}{{{{ part['text'] }}}}{{% endif %}}{{% endfor %}}{asked}"
    "{{% else %}}{{% for part in message['content'] %}}{answer}{{{{ part['text'] }}}}{{% endfor %}}{end}{{% endif %}}"
    "{{% endfor %}}"
)
_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


class LlavaAuthors(Llava):
    """Reads a folder of the authors' layout. The loaded model is of the family `llava`."""

    model_class = LlavaForConditionalGeneration
    key_mapping: ClassVar = {
        r"^model\.mm_projector\.0\.": "model.multi_modal_projector.linear_1.",
        r"^model\.mm_projector\.2\.": "model.multi_modal_projector.linear_2.",
        r"^model\.vision_tower\.vision_tower\.vision_model\.": "model.vision_tower.",
        r"^model\.(embed_tokens|layers|norm)\.": r"model.language_model.\1.",
    }
    text_config: ClassVar[type[PreTrainedConfig]]
    read_tokenizer = staticmethod(sentencepiece_tokenizer)
    words: ClassVar[dict[str, str]]  # what the template writes around question and answer

    @override
    def claims(self, values: Mapping[str, Any]) -> bool:
        return values.get("model_type") == self.model_type

    @override
    def check(self, folder: Path, values: Mapping[str, Any]) -> None:
        wanted = {
            "mm_projector_type": (values.get("mm_projector_type", "linear"), "mlp2x_gelu"),
            "mm_vision_select_feature": (values.get("mm_vision_select_feature", "patch"), "patch"),
            "mm_use_im_start_end": (bool(values.get("mm_use_im_start_end")), False),
            "mm_patch_merge_type": (values.get("mm_patch_merge_type", "flat"), "flat"),
        }
        for name, (found, known) in wanted.items():
            if found != known:
                raise ConfigError(
                    f"student.path {folder}: config.json: {name} is {found!r}; folders in the layout of LLaVA's "
                    f"authors are supported only with {known!r}: use a conversion to the transformers format"
                )
        if values.get("image_aspect_ratio") == "anyres":
            raise ConfigError(
                f"student.path {folder}: config.json: image_aspect_ratio is 'anyres', whose images take a varying "
                "number of tokens; use a conversion to the transformers format"
            )
        if not isinstance(tower_name(values), str):
            raise ConfigError(f"student.path {folder}: config.json does not name its vision tower (mm_vision_tower)")

    @override
    def config(self, folder: Path, settings: StudentConfig) -> Any:
        values = read_object(folder / "config.json")
        vision = tower_config(folder, tower_name(values), settings)
        known = {*self.text_config().to_dict(), "rope_theta", "rope_scaling"} - {"model_type", "architectures"}
        text = self.text_config(**{name: value for name, value in values.items() if name in known})
        tokenizer = self.read_tokenizer(folder)
        return LlavaConfig(
            vision_config=vision,
            text_config=text,
            image_token_index=reserve_image_token(tokenizer, text.vocab_size, folder),
            vision_feature_layer=values.get("mm_vision_select_layer", -2),
            vision_feature_select_strategy=_strategy(vision),
            tie_word_embeddings=values.get("tie_word_embeddings", False),
        )

    @override
    def processor(self, folder: Path, settings: StudentConfig) -> Any:
        values = read_object(folder / "config.json")
        vision = tower_config(folder, tower_name(values), settings)
        tokenizer = self.read_tokenizer(folder)
        if isinstance(end := values.get("eos_token_id"), int):  # where the authors' generation stops
            tokenizer.eos_token = tokenizer.convert_ids_to_tokens(end)
        image = tokenizer.convert_ids_to_tokens(reserve_image_token(tokenizer, values["vocab_size"], folder))
        tokenizer.chat_template = chat_template(tokenizer, folder, _TEMPLATE.format(image=image, **self.words))
        return LlavaProcessor(
            image_processor=image_processor(folder, tower_name(values), settings),
            tokenizer=tokenizer,
            patch_size=vision.patch_size,
            vision_feature_select_strategy=_strategy(vision),
            image_token=image,
            num_additional_image_tokens=int(_strategy(vision) == "default"),
            chat_template=tokenizer.chat_template,
        )


def _strategy(vision: Any) -> Literal["default", "full"]:
    return "full" if vision.model_type == "siglip_vision_model" else "default"  # which leaves the class token out


@register
class LlavaMistral(LlavaAuthors):
    """LLaVA-Med 1.5."""

    model_type = "llava_mistral"
    text_config = MistralConfig
    words: ClassVar = {"user": "{{ bos_token }}[INST] ", "asked": " [/INST]", "answer": " ", "end": " {{ eos_token }}"}


@register
class LlavaQwen2(LlavaAuthors):
    """HuatuoGPT-Vision-7B."""

    model_type = "llava_qwen2"
    text_config = Qwen2Config
    read_tokenizer = staticmethod(byte_level_tokenizer)
    words: ClassVar = {
        "user": "<|user|>\n",
        "asked": "{{ '\\n<|assistant|>\\n' }}",
        "answer": "",
        "end": "{{ eos_token }}",
    }


@register
class LlavaLlama(LlavaAuthors):
    """LLaVA 1.5 and models trained from it. LLaVA 1.0 also says `llava` in its config.json."""

    model_type = "llava_llama"
    text_config = LlamaConfig
    words: ClassVar = {
        "user": f"{{{{ bos_token }}}}{_SYSTEM} USER: ",
        "asked": " ASSISTANT:",
        "answer": " ",
        "end": "{{ eos_token }}",
    }

    @override
    def claims(self, values: Mapping[str, Any]) -> bool:
        flat = "text_config" not in values and not values.keys().isdisjoint(TOWER_KEYS)
        return super().claims(values) or (values.get("model_type") == "llava" and flat)
