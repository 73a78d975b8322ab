"""The process group: a port that another run has taken is named."""

from __future__ import annotations

import socket

import pytest
import torch

from medalign.engine import engine
from medalign.errors import ConfigError


def test_a_port_in_use_is_an_error_with_the_remedy(monkeypatch):
    """As a second `deepspeed --module medalign train` on a machine meets it."""
    with socket.socket() as other:
        other.bind(("0.0.0.0", 0))
        other.listen()
        port = str(other.getsockname()[1])
        for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(
            ConfigError, match=f"port {port} of this machine is in use.*--master_port N.*MASTER_PORT for srun"
        ):
            engine.start({})


def test_more_ranks_than_gpus_are_an_error_with_the_remedy(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("RANK", "10")
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ConfigError, match="rank 10 is number 2 of its node, counted from 0, but it sees 2 GPUs"):
        engine.start({})
