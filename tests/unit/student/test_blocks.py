"""The operations of the decoder blocks: SDPA in each block, and twice in blocks that are recomputed."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from medalign.config import LoraConfig, StudentConfig
from medalign.student.loading import load_student
from medalign.student.model import Student
from tests import tiny

HEADS = 4


def load(folder, **settings: Any) -> Student:
    return load_student(StudentConfig(path=str(folder), layer=1, lora=LoraConfig(rank=4), **settings), torch.float32)


@pytest.mark.parametrize(("checkpointing", "passes"), [(False, [1, 1, 1]), (True, [2, 1, 2])])
def test_all_checkpointed_blocks_but_the_tapped_one_are_recomputed(student_folder, checkpointing, passes):
    student = load(student_folder, gradient_checkpointing=checkpointing).train()
    count: Counter[int] = Counter()
    for number, block in enumerate(student.spec.blocks):
        block.mlp.register_forward_pre_hook(lambda *_, number=number: count.update([number]))
    output = student(tiny.batch())
    assert [count[number] for number in range(3)] == [1, 1, 1]
    (output.logits.square().mean() + output.tokens.square().mean() + output.attention.square().sum()).backward()
    assert [count[number] for number in range(3)] == passes


class Weights(TorchDispatchMode):
    """Records every tensor [.., heads, L, L] that an operation creates: attention weights or scores."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.shape, self.seen = (HEADS, length, length), set[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and (
                tensor.shape[-3:] == self.shape or tensor.shape[-2:] == self.shape[1:] and len(tensor) % HEADS == 0
            ):
                self.seen.add(str(func))
        return result


def blocks_in_sdpa(student: Student, monkeypatch: pytest.MonkeyPatch) -> tuple[list[int], set[str]]:
    """Blocks that call SDPA in a forward and backward pass, and operations that created attention weights."""
    inside: list[int] = []
    calls: list[int] = []
    for number, attention in enumerate(student.spec.attentions):
        attention.register_forward_pre_hook(lambda *_, number=number: inside.append(number))
        attention.register_forward_hook(lambda *_: inside.clear())
    kernel = torch.nn.functional.scaled_dot_product_attention

    def spy(*args: Any, **kwargs: Any) -> torch.Tensor:
        calls.extend(inside)
        return kernel(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    batch = tiny.batch()
    with Weights(batch.input_ids.shape[1]) as weights:
        output = student(batch)
        (output.logits.square().mean() + output.attention.square().sum()).backward()
    return calls, weights.seen


def test_every_block_runs_sdpa_and_creates_no_weights(student_folder, monkeypatch):
    calls, weights = blocks_in_sdpa(load(student_folder).train(), monkeypatch)
    assert calls == [0, 1, 2] and not weights


def test_eager_attention_is_detected(student_folder, monkeypatch):
    calls, weights = blocks_in_sdpa(load(student_folder, attention="eager").train(), monkeypatch)
    assert not calls and any("softmax" in name for name in weights)
