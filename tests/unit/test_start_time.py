"""The benchmark of a start: what it writes is a student, and what it reports are the extremes of the rounds."""

from __future__ import annotations

import json
from pathlib import Path

from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from medalign.config import StudentConfig
from medalign.student.checks import check_student
from tools.benchmarks import start_time

SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def test_the_processor_makes_a_student_of_a_model(tmp_path: Path) -> None:
    vision = CLIPVisionConfig(**SIZES, image_size=112, patch_size=14)
    text = LlamaConfig(**SIZES, vocab_size=300)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=299)
    LlavaForConditionalGeneration(config).save_pretrained(tmp_path)
    start_time.write_processor(tmp_path)
    spec, processor = check_student(StudentConfig(path=str(tmp_path), layer=1))
    assert len(processor.tokenizer) == 300 and processor.tokenizer.eos_token_id == 2
    assert spec.image.token_id == processor.tokenizer.convert_tokens_to_ids("<image>") == 299
    assert spec.image.count == 64


def test_the_extremes_of_the_rounds() -> None:
    rounds = [{"wall": {"imports": 2.0, "step 1": 9.0}}, {"wall": {"imports": 3.0, "step 1": 8.004}}]
    found = start_time.extremes(rounds)
    assert json.loads(json.dumps(found)) == {"wall": {"imports": [2.0, 3.0], "step 1": [8.0, 9.0]}}
    assert start_time.slowest([{"imports": 1.0}, {"imports": 2.0}]) == {"imports": 2.0}
