"""What is particular to a family: token types, positions in three axes, ends of turns, image sizes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from medalign.__main__ import main
from medalign.config import StudentConfig
from medalign.contracts import IGNORE, Batch, Sample
from medalign.data.batches.collator import Collator
from medalign.data.batches.prompts import PromptEncoder
from medalign.errors import ConfigError
from medalign.phantom import write_phantoms
from medalign.pipeline import build_question_collator
from medalign.student import backends
from medalign.student.checks import check_student
from medalign.student.families.base import Family
from medalign.student.families.gemma3 import Gemma3
from medalign.student.loading import load_processor, load_student
from medalign.student.model import Student
from tests.unit.student.families.cases import CASES

COUNTS = (1, 2, 0)  # images of each sample


def load(name: str, folder: Path) -> tuple[Student, Any]:
    config = CASES[name].config(CASES[name].save(folder))
    return load_student(config, torch.float32).eval(), load_processor(config)


def batch_of(student: Student, processor: Any, images: tuple[int, ...] = COUNTS, **settings: Any) -> Batch:
    encoder = PromptEncoder(processor, image=student.spec.image, max_length=400, max_images=2)
    gray = Image.new("L", (40, 20), 90)
    samples = [Sample(f"s{n}", "shard", "vqa", "Is it?" * (n + 1), "No.", "open", (gray,) * n) for n in images]
    return Collator(encoder, student.spec.preprocess_cfg(processor), None, **settings)(samples)


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> tuple[Student, Any]:
    return load("gemma3", tmp_path_factory.mktemp("native") / "gemma3")


@pytest.fixture(scope="module", params=["qwen2_5_vl", "qwen3_vl"])
def qwen(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Student, Any]:
    return load(request.param, tmp_path_factory.mktemp("native") / request.param)


def logits(student: Student, batch: Batch) -> torch.Tensor:
    with torch.no_grad():
        return student(replace(batch, labels=torch.where(batch.attention_mask, batch.input_ids, IGNORE))).logits


def test_gemma_without_token_types_would_be_another_model(gemma: tuple[Student, Any], monkeypatch) -> None:
    """Its image tokens would attend to earlier ones only, and nothing would say so."""
    student, processor = gemma
    batch = batch_of(student, processor)
    right = logits(student, batch)
    monkeypatch.setattr(Gemma3, "inputs", Family.inputs)
    assert (right - logits(student, batch)).abs().max() > 0.01 * right.abs().max()


def test_gemma_never_runs_flash_attention(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would lose the bidirectional part of the mask without a word, also where "auto" would choose it."""
    case = CASES["gemma3"]
    config = case.config(case.save(tmp_path / "gemma3"), attention="flash_attention_2")
    for refuse in (check_student, lambda settings: load_student(settings, torch.bfloat16)):
        with pytest.raises(ConfigError, match="attention is flash_attention_2, but in Gemma 3 .* mask; choose sdpa"):
            refuse(config)
    monkeypatch.setattr(backends, "choose_attention", lambda wanted, _: wanted.replace("auto", "flash_attention_2"))
    student = load_student(replace(config, attention="auto"), torch.float32)
    assert student.spec.model.config.text_config._attn_implementation == "medalign_sdpa"


def test_the_answers_of_gemma_end_with_its_turn(gemma: tuple[Student, Any]) -> None:
    """<eos> ends a text; the model ends its turns with <end_of_turn>."""
    student, processor = gemma
    encoder = PromptEncoder(processor, image=student.spec.image, max_length=400, max_images=2)
    assert processor.tokenizer.eos_token == "<eos>"
    assert encoder.end_token_id == processor.tokenizer.convert_tokens_to_ids("<end_of_turn>")
    student.end_with(encoder.end_token_id)
    assert encoder.end_token_id in student.end_tokens


@pytest.mark.parametrize("side", ["right", "left"])
def test_positions_of_qwen_are_those_of_the_model(qwen: tuple[Student, Any], side: str) -> None:
    student, processor = qwen
    batch = batch_of(student, processor, padding_side=side)
    places_BL = (batch.attention_mask.long().cumsum(-1) - 1).clamp(min=0)
    found = student.spec.family.positions(student.spec, batch, places_BL)
    grid = torch.tensor([[1, 8, 8]] * sum(COUNTS))
    types = (batch.image_index >= 0).int()
    expected, _ = student.spec.model.model.get_rope_index(
        batch.input_ids, types, grid, attention_mask=batch.attention_mask
    )
    assert torch.equal(found[0], places_BL)
    assert torch.equal(found[1:][:, batch.attention_mask], expected[:, batch.attention_mask])


def test_a_packed_row_has_the_positions_of_its_samples(qwen: tuple[Student, Any]) -> None:
    student, processor = qwen
    spec = student.spec
    padded, packed = batch_of(student, processor), batch_of(student, processor, packed=True)
    places = padded.attention_mask.long().cumsum(-1) - 1
    apart = spec.family.positions(spec, padded, places)[:, padded.attention_mask]
    row = torch.cat([torch.arange(length) for length in packed.lengths])[None]
    assert torch.equal(spec.family.positions(spec, packed, row)[:, 0], apart)


def test_qwen_with_positions_of_a_text_would_be_another_model(qwen: tuple[Student, Any], monkeypatch) -> None:
    student, processor = qwen
    batch = batch_of(student, processor)
    right = logits(student, batch)
    monkeypatch.setattr(type(student.spec.family), "positions", Family.positions)
    assert (right - logits(student, batch)).abs().max() > 0.01 * right.abs().max()


def test_the_tapped_tokens_are_the_input_of_the_block(qwen: tuple[Student, Any]) -> None:
    """Qwen3-VL adds features of the tower to what block 1 returns; block 2 gets the sum."""
    student, processor = qwen
    seen: list[torch.Tensor] = []
    block = student.spec.blocks[student.layer]
    handle = block.register_forward_pre_hook(lambda _block, args: seen.append(args[0]))
    batch = batch_of(student, processor)
    with torch.no_grad():
        output = student(batch)
    handle.remove()
    assert torch.equal(output.tokens.flatten(0, 1), seen[0][batch.cells])


@pytest.mark.parametrize("name", ["llava_next", "llava_onevision"])
def test_tiles_are_those_of_the_models_own_processor(tmp_path: Path, name: str) -> None:
    student, processor = load(name, tmp_path / name)
    image = Image.effect_noise((32, 32), 40).convert("RGB")
    pixels = student.spec.preprocess_cfg(processor).view(image)[None]
    batch = batch_of(student, processor, images=(1,))
    found = student.spec.family.inputs(student.spec, batch, pixels)
    own = processor.image_processor(images=[image], return_tensors="pt")
    assert found["image_sizes"].tolist() == own["image_sizes"].tolist()
    (whole, *tiles), (own_whole, *own_tiles) = found["pixel_values"][0], own["pixel_values"][0]
    torch.testing.assert_close(torch.stack(tiles), torch.stack(own_tiles), rtol=0, atol=1e-5)  # fp32 arithmetic
    level = 1 / 255 / min(processor.image_processor.image_std)
    # Half a level by its rounding, and half by that of its weights to 8 bits.
    torch.testing.assert_close(whole, own_whole, rtol=0, atol=level)


def test_the_cells_of_tiles_are_without_the_whole_and_the_line_ends(tmp_path: Path) -> None:
    student, processor = load("llava_next", tmp_path / "next")
    batch = batch_of(student, processor, images=(1, 2))
    tokens, cells = (batch.image_index >= 0).sum(1), batch.cells.sum(1)
    assert tokens.tolist() == [24, 48] and cells.tolist() == [16, 32]
    rows = batch.cells[0][batch.image_index[0] >= 0].tolist()
    assert rows == [False] * 4 + ([True] * 4 + [False]) * 4


def test_inspect_shows_cells_and_companions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_phantoms(tmp_path / "data", train=4, val=1, seed=0)
    words = ["--data.train", str(tmp_path / "data/train"), "--train.batch_size", "2", "--data.max_length", "400"]
    shown = {}
    for name in ("llava_next", "gemma3"):
        folder = CASES[name].save(tmp_path / name)
        assert main(["inspect", "phantom", *words, "--student.path", str(folder)]) == 0
        shown[name] = capsys.readouterr().out
    assert "[image of 24 tokens, of which 16 are cells]" in shown["llava_next"]
    assert "[image of 16 tokens]" in shown["gemma3"]
    assert "<start_of_turn>user\n\n\n<start_of_image>" in shown["gemma3"] and "<end_of_image>" in shown["gemma3"]


def test_a_sample_of_onevision_has_one_image(tmp_path: Path) -> None:
    student, processor = load("llava_onevision", tmp_path / "onevision")
    with pytest.raises(ConfigError, match="2 images, but a student of the family llava_onevision takes 1 per sample"):
        build_question_collator(student.spec, processor, 400, 2)


def test_an_arrangement_of_tiles_that_the_student_does_not_know(tmp_path: Path) -> None:
    case = CASES["llava_next"]
    folder = case.save(tmp_path / "next")
    values = json.loads((folder / "config.json").read_text()) | {"image_grid_pinpoints": [[16, 32]]}
    (folder / "config.json").write_text(json.dumps(values))
    with pytest.raises(ConfigError, match=r"image_grid_pinpoints do not contain \[32, 32\], the 2 x 2 tiles"):
        check_student(case.config(folder))


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"model_type": "mllama"}, "the image is not a part of its sequence"),
        ({"model_type": "hulumed_qwen2", "auto_map": {}}, "the tokens of an image have no fixed places on a grid"),
        ({"model_type": "chexagent"}, "the tokens of an image have no fixed places on a grid"),
        ({"model_type": "phi", "auto_map": {}}, "it needs code from its folder, which is never run"),
        ({"model_type": "maira2", "auto_map": {}}, "a LLaVA with a DINOv2 tower .* is supported"),
        ({"model_type": "qwen3_vl_moe"}, "LoRA does not reach the experts"),
        ({"model_type": "internvl_chat", "auto_map": {}}, "choose the conversion to the transformers format"),
        ({"model_type": "vit"}, "'vit' is not supported; supported: gemma3, internvl, llava"),
    ],
)
def test_models_that_cannot_be_students(tmp_path: Path, values: dict[str, Any], reason: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(values))
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ConfigError, match=rf"model type '{values['model_type']}' is not supported.*{reason}|{reason}"):
        check_student(StudentConfig(path=str(tmp_path)))


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("qwen2_5_vl", 30, "student.image_size is 30, which is not a multiple of 8, .*; set it to 32"),
        ("qwen3_vl", 3, "student.image_size is 3, which is not a multiple of 8, .*; set it to 8"),
        ("llava", 48, "student.image_size is 48, but this student takes images of 32 pixels only; set it to null"),
    ],
)
def test_image_sizes_that_do_not_fit(tmp_path: Path, name: str, size: int, message: str) -> None:
    case = CASES[name]
    with pytest.raises(ConfigError, match=message):
        check_student(case.config(case.save(tmp_path / name), image_size=size))


def test_the_canvas_may_have_another_size(tmp_path: Path) -> None:
    case = CASES["qwen2_5_vl"]
    spec, _ = check_student(case.config(case.save(tmp_path / "qwen"), image_size=48))
    assert (spec.grid.rows, spec.image_size) == (6, 48)
