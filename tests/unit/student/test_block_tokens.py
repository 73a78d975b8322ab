"""Visual tokens at the input of every block."""

from __future__ import annotations

import torch

from medalign.config import LoraConfig, StudentConfig
from medalign.geometry import gather_images
from medalign.student.block_tokens import block_tokens
from medalign.student.loading import load_student
from tests import tiny


def test_tokens_are_the_inputs_of_the_blocks_before_and_after_w(student_folder):
    """Bit by bit: nothing is computed again."""
    settings = StudentConfig(path=str(student_folder), layer=2, lora=LoraConfig(rank=4, alpha=8), attention="sdpa")
    student, batch = load_student(settings, torch.float32).eval(), tiny.batch(side="left")
    torch.nn.init.normal_(student.steering.weight, std=0.05)
    outputs = []
    hooks = [block.register_forward_hook(lambda *given: outputs.append(given[-1])) for block in student.spec.blocks]
    found = block_tokens(student, batch)
    for hook in hooks:
        hook.remove()
    assert [(block, steered) for block, steered, _ in found] == [(0, False), (1, False), (2, False), (2, True)]
    for (block, _, tokens), output in zip(found[1:3], outputs, strict=False):
        assert torch.equal(tokens, gather_images(output, batch.cells, 2, 16)), block
    before, after = found[2].tokens_IND, found[3].tokens_IND
    with torch.no_grad():
        assert torch.equal(after, student(batch).tokens)  # what the training taps, and no hook remains
        torch.testing.assert_close(after, before + before @ student.steering.weight.T)
    assert (after - before).abs().max() > 0.01
    assert all(len(block._forward_pre_hooks) == (index == 2) for index, block in enumerate(student.spec.blocks))
