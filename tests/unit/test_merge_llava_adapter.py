"""An adapter in the layout of LLaVA's own code, merged into a student's folder, equals peft's own merge."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

from medalign.config import StudentConfig
from medalign.student.checks import check_student
from medalign.student.weights import load_model
from tests.unit.student.families import authors
from tools.merge_llava_adapter import _TOWER, main


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base/, tower/ and adapter/, in the form in which LLaVA-Rad is published."""
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("rad")
    authors.save_sentencepiece(root / "base")
    text = LlamaConfig(vocab_size=32000, bos_token_id=1, eos_token_id=2, **authors.SIZES)
    base = LlamaForCausalLM(text)
    base.save_pretrained(root / "base", max_shard_size="2MB")
    CLIPVisionModel(authors.VISION).save_pretrained(root / "tower")
    state = load_file(root / "tower" / "model.safetensors")
    names = {f"vision_model.{name.removeprefix('vision_model.')}": value for name, value in state.items()}
    save_file(names, root / "tower" / "model.safetensors", metadata={"format": "pt"})
    authors.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(
        root / "tower"
    )
    adapted = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    adapted.save_pretrained(root / "adapter")
    projector = torch.nn.Sequential(torch.nn.Linear(24, 32), torch.nn.GELU(), torch.nn.Linear(32, 32)).state_dict()
    named = {f"base_model.model.model.mm_projector.{name}": value for name, value in projector.items()}
    torch.save(named, root / "adapter" / "non_lora_trainables.bin")
    settings = {"model_type": "llava_llama", "mm_vision_tower": "openai/clip", "mm_projector_type": "mlp2x_gelu"}
    settings |= {"mm_hidden_size": 24, "mm_vision_select_layer": -2, "mm_vision_select_feature": "patch"}
    (root / "adapter" / "config.json").write_text(json.dumps(settings))
    return root


def words(root: Path, output: Path) -> list[str]:
    return [str(root / "adapter"), f"--base={root}/base", f"--tower={root}/tower", f"--output={output}"]


def test_the_folder_is_a_student_with_the_adapter_in_its_weights(parts: Path, tmp_path: Path) -> None:
    assert main(words(parts, tmp_path / "out")) == 0
    config = StudentConfig(path=str(tmp_path / "out"), layer=1)
    check_student(config)
    model = load_model(config.path, config, dtype=torch.float32)
    plain = AutoModelForCausalLM.from_pretrained(parts / "base", dtype=torch.float32)
    merged = PeftModel.from_pretrained(plain, parts / "adapter").merge_and_unload()
    found = model.model.language_model.state_dict()
    for name, value in merged.model.state_dict().items():
        torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-6)
    assert torch.equal(model.lm_head.weight, merged.lm_head.weight)
    trained = torch.load(parts / "adapter" / "non_lora_trainables.bin", weights_only=True)
    assert torch.equal(
        model.model.multi_modal_projector.linear_2.weight, trained["base_model.model.model.mm_projector.2.weight"]
    )
    tower = load_file(parts / "tower" / "model.safetensors")["vision_model.embeddings.patch_embedding.weight"]
    assert torch.equal(model.model.vision_tower.state_dict()["embeddings.patch_embedding.weight"], tower)


def test_the_type_of_the_base_and_its_prompt_are_kept(parts: Path, tmp_path: Path) -> None:
    """An adapter on LLaVA-Med 1.5 is no Llama with the prompt of Vicuna."""
    shutil.copytree(parts, tmp_path / "parts")
    _change(tmp_path / "parts" / "adapter" / "config.json", model_type="llava_mistral", num_key_value_heads=2)
    base = tmp_path / "parts" / "base"
    _change(base / "config.json", model_type="llava_mistral")
    earlier = {"model.mm_projector.0.weight": torch.zeros(32, 24), f"{_TOWER}pre_layrnorm.weight": torch.zeros(24)}
    save_file(earlier, base / "model-00099.safetensors", metadata={"format": "pt"})  # the adapter has others
    assert main(words(tmp_path / "parts", tmp_path / "out")) == 0
    config = StudentConfig(path=str(tmp_path / "out"), layer=1)
    model = load_model(config.path, config, dtype=torch.float32).model
    assert model.multi_modal_projector.linear_1.weight.any() and model.vision_tower.pre_layrnorm.weight.any()
    names = [name for path in (tmp_path / "out").glob("*.safetensors") for name in load_file(path)]
    assert len(names) == len(set(names))
    spec, processor = check_student(config)
    assert spec.language_model.config.model_type == "mistral"
    turns = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Is it?"}]}]
    assert processor.apply_chat_template(turns) == "<s>[INST] <unk>\nIs it? [/INST]"


def _change(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "projector": (lambda root: (root / "adapter" / "non_lora_trainables.bin").unlink(), "has neither non_lora_train"),
    "dora": (lambda root: _change(root / "adapter" / "adapter_config.json", use_dora=True), "only plain LoRA"),
    "alpha_pattern": (
        lambda root: _change(root / "adapter" / "adapter_config.json", alpha_pattern={"q_proj": 16}),
        "alpha_pattern is {'q_proj': 16}; only plain LoRA",
    ),
    "rank_pattern": (
        lambda root: _change(root / "adapter" / "adapter_config.json", rank_pattern={"q_proj": 2}),
        "rank_pattern is {'q_proj': 2}; only plain LoRA",
    ),
    "another base": (
        lambda root: _change(root / "base" / "config.json", model_type="mistral"),
        "model_type is 'llava_llama', but that of the base is 'mistral'",
    ),
    "type": (
        lambda root: _change(root / "adapter" / "config.json", model_type="llava_phi"),
        "config.json: model_type is 'llava_phi'; only llava, llava_llama, llava_mistral, llava_qwen2 are known",
    ),
    "adapter": (lambda root: (root / "adapter" / "adapter_model.safetensors").unlink(), "no adapter_model.safetensors"),
    "base": (
        lambda root: [path.unlink() for path in (root / "base").glob("model-0000[2-9]*")],
        "does not have; give the",
    ),
    "tower": (lambda root: (root / "tower" / "preprocessor_config.json").unlink(), "has no preprocessor_config.json"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_missing_is_named(parts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], fault: str) -> None:
    shutil.copytree(parts, tmp_path / "parts")
    change, message = FAULTS[fault]
    change(tmp_path / "parts")
    assert main(words(tmp_path / "parts", tmp_path / "out")) == 2
    assert message in capsys.readouterr().err
    assert main([*words(parts, tmp_path)]) == 2  # a folder that exists
