"""QLoRA: only linear layers of blocks have 4 bits; clear errors where it cannot work."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from medalign.config import Config, LoraConfig, StudentConfig
from medalign.engine.settings import deepspeed_settings
from medalign.errors import ConfigError
from medalign.student.checks import check_student
from medalign.student.loading import load_student
from tests import tiny


def config(folder: Path, quantization: str = "nf4") -> StudentConfig:
    lora = LoraConfig(rank=4)
    return StudentConfig(path=str(folder), layer=2, lora=lora, quantization=quantization)  # type: ignore[arg-type]


def test_without_the_package_it_is_refused_before_weights_are_read(
    student_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "bitsandbytes" else found(name, *a)
    )
    with pytest.raises(ConfigError, match="nf4, which needs the package bitsandbytes .pip install bitsandbytes.; or"):
        check_student(config(student_folder))
    with pytest.raises(ConfigError, match="needs the package bitsandbytes"):
        load_student(config(student_folder), torch.float32)


def test_zero3_is_refused(student_folder: Path) -> None:
    run = Config(student=config(student_folder))
    with pytest.raises(ConfigError, match="nf4, but engine.deepspeed zero3 is ZeRO stage 3, .* set .* to zero2"):
        deepspeed_settings(run, 1)
    run.engine.deepspeed = "zero2"
    assert deepspeed_settings(run, 1)["zero_optimization"]["stage"] == 2


def test_a_step_in_4_bits(student_folder: Path) -> None:
    """Its output is that of a student whose weights were rounded to what 4 bits hold."""
    functional = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is not installed")
    student = load_student(config(student_folder), torch.float32).train()
    layers = {
        name: m for name, m in student.named_modules() if type(m).__name__ == "Linear4bit" and "base_layer" in name
    }
    assert len(layers) == 3 * 7 and all(".language_model.layers." in name for name in layers)
    plain = load_student(config(student_folder, "none"), torch.float32).train()
    with torch.no_grad():
        for name, layer in layers.items():
            rounded = functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
            plain.get_parameter(f"{name}.weight").copy_(rounded)
    batch = tiny.batch()
    found, expected = student(batch).logits, plain(batch).logits
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    found.square().mean().backward()
    expected.square().mean().backward()
    for (name, mine), (_, other) in zip(*(s.trainable()["adapters"] for s in (student, plain)), strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-3, atol=1e-5, msg=name)
