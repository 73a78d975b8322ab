"""The attention backend: flash where it can run, otherwise SDPA with one log line; a name is accepted or rejected."""

import importlib.util
import logging

import pytest
import torch

from medalign.errors import ConfigError
from medalign.student.backends import choose_attention

LOG_LINE = "attention: sdpa, because flash-attn is not installed (pip install flash-attn --no-build-isolation)"


@pytest.fixture
def machine(monkeypatch):
    """A machine with or without a GPU and the flash-attn package."""
    find = importlib.util.find_spec

    def build(gpu: bool, flash: bool) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
        found = find("torch") if flash else None
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: found if name == "flash_attn" else find(name))

    return build


@pytest.mark.parametrize(
    ("gpu", "flash", "wanted", "chosen", "lines"),
    [
        (True, True, "auto", "flash_attention_2", []),
        (True, False, "auto", "sdpa", [LOG_LINE]),
        (False, True, "auto", "sdpa", []),
        (False, False, "auto", "sdpa", []),
        (True, True, "flash_attention_2", "flash_attention_2", []),
        (True, True, "sdpa", "sdpa", []),
        (True, False, "sdpa", "sdpa", []),
        (True, False, "eager", "eager", []),
    ],
)
def test_the_choice(machine, caplog, gpu, flash, wanted, chosen, lines):
    machine(gpu, flash)
    with caplog.at_level(logging.INFO):
        assert choose_attention(wanted) == chosen
    assert [record.getMessage() for record in caplog.records] == lines


@pytest.mark.parametrize(("gpu", "flash"), [(True, False), (False, True), (False, False)])
def test_flash_by_name_is_rejected_where_it_cannot_run(machine, gpu, flash):
    machine(gpu, flash)
    with pytest.raises(ConfigError, match=r"student.attention is flash_attention_2.*pip install.*or choose sdpa"):
        choose_attention("flash_attention_2")
