"""flash-attention through transformers, with a substitute for the package that runs on a CPU.

`tests/gpu` runs the package itself where it is installed.
"""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch
from transformers import modeling_flash_attention_utils as flash

from medalign.config import LoraConfig, StudentConfig
from medalign.errors import ConfigError
from medalign.student import backends
from medalign.student.backends import choose_attention
from medalign.student.loading import load_student
from medalign.student.model import Student, check_causality
from tests import tiny


def varlen(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    deterministic=False,
):
    """`flash_attn_varlen_func` on the CPU: [tokens, heads, channels] of concatenated sequences."""
    queries, keys = cu_seqlens_q.diff().tolist(), cu_seqlens_k.diff().tolist()
    assert causal and (max(queries), max(keys)) == (max_seqlen_q, max_seqlen_k)
    assert queries == keys or set(queries) == {1}  # all tokens of a sequence, or its next token
    parts = (t.transpose(0, 1).split(lengths, dim=1) for t, lengths in ((q, queries), (k, keys), (v, keys)))
    settings = {"is_causal": queries == keys, "scale": softmax_scale, "enable_gqa": True}
    attend = torch.nn.functional.scaled_dot_product_attention
    return torch.cat([attend(*part, **settings) for part in zip(*parts, strict=True)], dim=1).transpose(0, 1)


def dense(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, deterministic=False):
    """`flash_attn_func`: [samples, tokens, heads, channels]."""
    borders = torch.arange(len(q) + 1) * q.shape[1]
    flat = varlen(
        *(t.flatten(0, 1) for t in (q, k, v)), borders, borders, q.shape[1], q.shape[1], 0.0, softmax_scale, causal
    )
    return flat.view_as(q)


@pytest.fixture
def package(monkeypatch):
    """flash-attn as transformers imports it; the state of transformers is restored afterwards."""
    module, padding = ModuleType("flash_attn"), ModuleType("flash_attn.bert_padding")
    module.flash_attn_func, module.flash_attn_varlen_func, module.flash_attn_with_kvcache = dense, varlen, None
    padding.pad_input, padding.unpad_input = flash._pad_input, flash._unpad_input
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    monkeypatch.setitem(sys.modules, "flash_attn.bert_padding", padding)
    monkeypatch.setattr(flash, "is_flash_attn_2_available", lambda: True)
    monkeypatch.setattr(flash, "_loaded_implementation", None)
    monkeypatch.setattr(backends, "choose_attention", lambda wanted, *_: wanted)  # there is no GPU


def load(folder, attention: str) -> Student:
    student = load_student(
        StudentConfig(path=str(folder), layer=2, lora=LoraConfig(rank=4, alpha=8), attention=attention), torch.float32
    )
    torch.manual_seed(1)
    for named in student.trainable().values():
        for _, parameter in named:
            torch.nn.init.normal_(parameter, std=0.05)
    return student


@pytest.mark.parametrize("form", ["even", "padded", "left", "packed"])
def test_outputs_equal_those_with_sdpa(student_folder, package, form):
    """The same sums in another order, in float32."""
    batch = tiny.batch(
        texts=((5, 4), (7, 2)) if form == "even" else ((5, 4), (9, 2)), side="left" if form == "left" else "right"
    )
    batch = tiny.packed(batch) if form == "packed" else batch
    with torch.no_grad():
        expected, found = (load(student_folder, name)(batch) for name in ("sdpa", "flash_attention_2"))
    valid = batch.attention_mask[:, expected.kept]
    torch.testing.assert_close(found.logits[valid], expected.logits[valid], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.tokens, expected.tokens, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.attention, expected.attention, rtol=1e-4, atol=1e-6)


def test_it_is_causal_and_generates(student_folder, package):
    student = load(student_folder, "flash_attention_2").eval()
    check_causality(student, tiny.batch())
    settings = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    batch = tiny.batch(side="left")
    found, _ = student.generate(batch, **settings)
    expected, _ = load(student_folder, "sdpa").eval().generate(batch, **settings)
    assert torch.equal(found, expected)


def test_float32_does_not_use_flash_attention(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(backends.importlib.util, "find_spec", lambda name: object())
    assert choose_attention("auto", torch.bfloat16) == "flash_attention_2"
    assert choose_attention("auto", torch.float32) == "sdpa"
    with pytest.raises(ConfigError, match="half precision only.*set train.precision to bf16, or choose sdpa"):
        choose_attention("flash_attention_2", torch.float32)
