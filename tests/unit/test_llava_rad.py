"""LLaVA-Rad's layout, from random weights: a student with the logits of a plain implementation of its authors' model.

The adapter's folder has adapter_model.bin, non_lora_trainables.bin, and beside them the description and the training
checkpoint of a tower of open_clip and timm; the base has pytorch_model-*.bin only, as Vicuna 1.5 is published.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from PIL import Image
from timm.models import register_model
from timm.models.vision_transformer import VisionTransformer
from transformers import LlamaConfig, LlamaForCausalLM

from medalign.config import StudentConfig
from medalign.contracts import IGNORE, Sample
from medalign.data.batches.collator import Collator
from medalign.data.batches.prompts import PromptEncoder
from medalign.student.checks import check_student
from medalign.student.loading import load_student
from medalign.teacher.source import TeacherSource
from medalign.teacher.towers.timm_vit import TimmTower
from tests import mistral
from tests.unit.student.families import authors
from tools.merge_llava_adapter import main

SIZE, PATCH, WIDTH, HEADS, DEPTH = 70, 14, 24, 3, 3  # 518, 14, 768, 12, 12
QUESTION = "Provide a description of the findings in the radiology image given the following indication: cough"
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
CONFIG, CHECKPOINT = "biomedclipcxr_518.json", "biomedclipcxr_518_checkpoint.pt"
BASE = LlamaConfig(vocab_size=32000, bos_token_id=1, eos_token_id=2, **authors.SIZES)


@register_model
def medalign_tiny_dinov2(**kwargs: Any) -> VisionTransformer:
    """A small vit_base_patch14_dinov2, whose blocks have a scale per channel."""
    for key in ("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"):
        kwargs.pop(key, None)
    sizes = {"img_size": SIZE, "patch_size": PATCH, "embed_dim": WIDTH, "depth": DEPTH, "num_heads": HEADS}
    model = VisionTransformer(**sizes, init_values=0.5, **kwargs)
    model.default_cfg = {}  # open_clip looks for the size of the pooling here
    return model


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """llava-rad/ and vicuna/."""
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("published")
    base = _write_vicuna(root / "vicuna")
    adapter = root / "llava-rad"
    adapted = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    adapted.save_pretrained(adapter)
    (adapter / "adapter_model.safetensors").unlink()
    torch.save(get_peft_model_state_dict(adapted), adapter / "adapter_model.bin")
    projector = {"0.weight": (32, WIDTH), "0.bias": (32,), "2.weight": (32, 32), "2.bias": (32,)}
    trained = {f"base_model.model.model.mm_projector.{name}": torch.randn(s) / 4 for name, s in projector.items()}
    torch.save(trained, adapter / "non_lora_trainables.bin")
    settings = {"model_type": "llava", "mm_vision_tower": "biomedclip_cxr_518", "mm_projector_type": "mlp2x_gelu"}
    settings |= {"mm_hidden_size": WIDTH, "mm_vision_select_layer": -2, "mm_vision_select_feature": "patch"}
    settings |= {"mm_vision_tower_config": f"llava/{CONFIG}", "mm_vision_tower_checkpoint": CHECKPOINT}
    settings |= {"mm_use_im_start_end": False, "mm_use_im_patch_token": False, "image_aspect_ratio": "square"}
    (adapter / "config.json").write_text(json.dumps(settings))
    _write_tower(adapter)
    return root


def _write_vicuna(folder: Path) -> LlamaForCausalLM:
    authors.save_sentencepiece(folder)
    base = LlamaForCausalLM(BASE)
    with torch.no_grad():
        for parameter in base.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
    BASE.save_pretrained(folder)
    state = base.state_dict()
    half = len(state) // 2
    for number, names in enumerate((list(state)[:half], list(state)[half:]), start=1):
        buffers = {f"model.layers.{number}.self_attn.rotary_emb.inv_freq": torch.ones(4)}
        file = folder / f"pytorch_model-0000{number}-of-00002.bin"
        torch.save({name: state[name].clone() for name in names} | buffers, file)
    return base


def _write_tower(folder: Path) -> None:
    """Write the tower as open_clip's training does: DistributedDataParallel's names, text tower, optimizer."""
    vision = {"timm_model_name": "medalign_tiny_dinov2", "timm_model_pretrained": False, "timm_pool": ""}
    vision |= {"timm_proj": "linear", "image_size": SIZE}
    text = {"hf_model_name": "bert", "hf_tokenizer_name": "bert", "hf_proj_type": "mlp", "context_length": 256}
    (folder / CONFIG).write_text(json.dumps({"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}))
    trunk = medalign_tiny_dinov2(num_classes=0)
    state = {f"module.visual.trunk.{name}": torch.randn_like(value) / 4 for name, value in trunk.state_dict().items()}
    state |= {"module.visual.head.proj.weight": torch.randn(16, WIDTH), "module.logit_scale": torch.tensor(4.0)}
    state |= {"module.text.transformer.pooler.dense.weight": torch.zeros(2, 2)}
    torch.save(state, folder.parent / "tower.pt")
    optimizer = {"param_groups": [{"lr": np.float64(1e-4)}]}
    torch.save({"epoch": 3, "name": "cxr", "state_dict": state, "optimizer": optimizer}, folder / CHECKPOINT)


def words(root: Path, output: Path, *more: str) -> list[str]:
    return [str(root / "llava-rad"), f"--base={root}/vicuna", f"--output={output}", *more]


def plain_tower(state: dict[str, torch.Tensor], pixels: torch.Tensor) -> torch.Tensor:
    """The patches before the last block: `hidden_states[-2][:, 1:]` of the authors' loop over timm's blocks."""
    w = {name.removeprefix("module.visual.trunk."): value for name, value in state.items()}
    x = F.conv2d(pixels, w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], stride=PATCH).flatten(2).mT
    x = torch.cat([w["cls_token"].expand(len(x), -1, -1), x], dim=1) + w["pos_embed"]
    for i in range(DEPTH - 1):
        b = {name.removeprefix(f"blocks.{i}."): value for name, value in w.items()}
        normed = F.layer_norm(x, (WIDTH,), b["norm1.weight"], b["norm1.bias"], 1e-6)
        qkv = F.linear(normed, b["attn.qkv.weight"], b["attn.qkv.bias"]).unflatten(-1, (3, HEADS, -1))
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        weights = (query @ key.mT / (WIDTH // HEADS) ** 0.5).softmax(-1)
        mixed = (weights @ value).transpose(1, 2).flatten(2)
        x = x + b["ls1.gamma"] * F.linear(mixed, b["attn.proj.weight"], b["attn.proj.bias"])
        normed = F.layer_norm(x, (WIDTH,), b["norm2.weight"], b["norm2.bias"], 1e-6)
        inner = F.gelu(F.linear(normed, b["mlp.fc1.weight"], b["mlp.fc1.bias"]))
        x = x + b["ls2.gamma"] * F.linear(inner, b["mlp.fc2.weight"], b["mlp.fc2.bias"])
    return x[:, 1:]


def plain_logits(root: Path, picture: Image.Image, answer: str) -> tuple[list[int], torch.Tensor]:
    """Ids (image tokens as -1) and logits by the authors' code, written out: the text is cut at "<image>"."""
    from sentencepiece import SentencePieceProcessor

    adapter = root / "llava-rad"
    pieces = SentencePieceProcessor(model_file=str(mistral.sentencepiece_model()))
    before, after = (pieces.encode(part) for part in (f"{SYSTEM} USER: ", f"\n{QUESTION} ASSISTANT: {answer}"))
    before, after = [1, *before], [*after, 2]
    pixels = (torch.from_numpy(np.array(picture)) / 255 - torch.tensor(MEAN)) / torch.tensor(STD)
    tower = torch.load(root / "tower.pt", weights_only=True)
    features = plain_tower(tower, pixels.permute(2, 0, 1)[None])
    trained = torch.load(adapter / "non_lora_trainables.bin", weights_only=True)
    w = {name.removeprefix("base_model.model.model.mm_projector."): value for name, value in trained.items()}
    image = F.linear(F.gelu(F.linear(features, w["0.weight"], w["0.bias"])), w["2.weight"], w["2.bias"])[0]
    language = LlamaForCausalLM(BASE)
    for file in sorted((root / "vicuna").glob("*.bin")):
        language.load_state_dict(torch.load(file, weights_only=True), strict=False)
    embed = language.get_input_embeddings()
    inputs = torch.cat([embed(torch.tensor(before)), image, embed(torch.tensor(after))])
    model = PeftModel.from_pretrained(language, adapter).eval()
    return [*before, *[-1] * len(image), *after], model(inputs_embeds=inputs[None]).logits[0]


@torch.no_grad()
def test_its_logits_are_those_of_a_plain_implementation(published: Path, tmp_path: Path) -> None:
    assert main(words(published, tmp_path / "rad")) == 0
    config = StudentConfig(path=str(tmp_path / "rad"), layer=1)
    spec, processor = check_student(config)
    assert (spec.image_size, spec.image.count) == (SIZE, (SIZE // PATCH) ** 2)  # 518 pixels: 1,369 tokens
    draw = np.random.default_rng(0)
    picture = Image.fromarray(draw.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8))
    sample = Sample("k", "shard", "vqa", QUESTION, "Clear lungs.", "open", (picture,))
    encoder = PromptEncoder(processor, image=spec.image, max_length=1000, max_images=1)
    batch = Collator(encoder, spec.preprocess_cfg(processor), None)([sample])
    ids, expected = plain_logits(published, picture, "Clear lungs.")
    assert torch.where(batch.image_index < 0, batch.input_ids, -1).tolist() == [ids]
    student = load_student(config, torch.float32).eval()
    supervised = replace(batch, labels=torch.where(batch.attention_mask, batch.input_ids, IGNORE))
    found = student(supervised).logits.reshape(-1, 32000)
    assert len(found) >= len(ids) - 1  # after the last token nothing is supervised
    # float32 in other orders of addition; the tower differs by 1e-6.
    torch.testing.assert_close(found, expected[: len(found)], rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    assert float(expected.std()) > 0.1  # the logits are not all alike


def test_the_published_tower_has_1369_patches() -> None:
    """518 pixels in patches of 14, by the names in its own description; on the meta device."""
    vision = {"timm_model_name": "vit_base_patch14_dinov2.lvd142m", "timm_model_pretrained": False, "timm_pool": ""}
    config = {"embed_dim": 512, "vision_cfg": {**vision, "timm_proj": "linear", "image_size": 518}}
    source = TeacherSource(CONFIG, "timm", config, Path(CHECKPOINT), MEAN, STD)
    assert TimmTower.check(source) == 518
    with torch.device("meta"):
        tower = TimmTower.build(source, "before_norm")
    assert (tower.grid.size, tower.width, tower.prefix_tokens) == (1369, 768, 1)


class Hostile:
    def __reduce__(self) -> Any:
        return (print, ("ran",))


def _edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "a second checkpoint": (
        lambda root: shutil.copy(root / CHECKPOINT, root / "b.pt"),
        "must be the only .pt file: b.pt",
    ),
    "no tower": (lambda root: (root / CONFIG).unlink(), "with --tower"),
    "a hostile tower": (lambda root: torch.save(Hostile(), root / CHECKPOINT), "Code in a file is never run"),
    "a hostile projector": (
        lambda root: torch.save(Hostile(), root / "non_lora_trainables.bin"),
        "Code in a file is never run",
    ),
    "not of timm": (
        lambda root: _edit(root / CONFIG, lambda values: values["vision_cfg"].pop("timm_model_name")),
        "vision_cfg has no timm_model_name",
    ),
    "another size": (
        lambda root: _edit(root / CONFIG, lambda values: values["vision_cfg"].update(image_size=84)),
        "image_size is 84, but medalign_tiny_dinov2 takes 70 pixels",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_wrong_is_named(
    published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], fault: str
) -> None:
    shutil.copytree(published, tmp_path / "parts")
    change, message = FAULTS[fault]
    change(tmp_path / "parts" / "llava-rad")
    assert main(words(tmp_path / "parts", tmp_path / "out")) == 2
    printed = capsys.readouterr()
    assert message in printed.err and "ran" not in printed.out and not (tmp_path / "out").exists()
