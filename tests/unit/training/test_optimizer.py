"""AdamW takes its settings from the parameter groups."""

import pytest
import torch

from medalign.assembly import parameter_groups
from medalign.config import Config, OptimizerConfig


class OneGroup:
    """A student that trains one vector."""

    def __init__(self) -> None:
        self.weight = torch.nn.Parameter(torch.tensor([1.0, -2.0, 3.0]))

    def trainable(self):
        return {"adapters": [("weight", self.weight)]}


def after_steps(optimizer, weight):
    for step in range(1, 6):
        weight.grad = torch.tensor([0.3, -0.1, 1e-6]) * step
        optimizer.step()
    return weight.detach()


def test_the_defaults_are_bit_identical_to_adamw_with_its_usual_constants():
    student, plain = OneGroup(), OneGroup()
    usual = torch.optim.AdamW([plain.weight], lr=2e-4, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    found = after_steps(torch.optim.AdamW(parameter_groups(student, Config())), student.weight)
    assert torch.equal(found, after_steps(usual, plain.weight))


@pytest.mark.parametrize("settings", [{"betas": (0.5, 0.9)}, {"eps": 1e-2}])
def test_a_setting_reaches_the_optimizer(settings):
    student, plain = OneGroup(), OneGroup()
    usual = torch.optim.AdamW([plain.weight], lr=2e-4, weight_decay=0.0, **settings)
    config = Config(optimizer=OptimizerConfig(**settings))
    found = after_steps(torch.optim.AdamW(parameter_groups(student, config)), student.weight)
    assert torch.equal(found, after_steps(usual, plain.weight))
