"""The worker of test_plan.py: counts the bytes that torch holds for a student under ZeRO."""

from __future__ import annotations

from typing import Any

import torch

from medalign import assembly, distributed
from medalign import config as settings_of
from medalign.config import Config
from medalign.engine import engine as door
from medalign.engine.engine import Engine
from medalign.engine.settings import deepspeed_settings, precision
from medalign.student import loading
from tests import tiny
from tests.distributed.workers import main


def held(settings: dict[str, Any]) -> dict[str, dict[str, int]]:
    """Return the bytes of this rank by kind, for each DeepSpeed configuration."""
    door.start({})
    found = {}
    for name, engine in settings["engines"].items():
        config = settings_of.load(settings["recipe"], ["--engine.deepspeed", engine])
        found[name] = _held(config)
    door.stop()
    return found


def _held(config: Config) -> dict[str, int]:
    ds_settings = deepspeed_settings(config, distributed.world_size())
    with door.sharded_loading(ds_settings):
        student = loading.load_student(config.student, precision(config))
    student.train()
    engine = Engine(student, assembly.parameter_groups(student, config), ds_settings)
    rates = dict.fromkeys(student.trainable(), 1e-3)
    gradients = 0
    for number in range(2 * engine.accumulation):
        output = engine(tiny.batch(seed=number))
        engine.backward(output.logits.float().pow(2).mean() + output.tokens.float().pow(2).mean())
        gradients = max(gradients, _gradients(engine._engine.optimizer))
        engine.step(rates)
    optimizer = engine._engine.optimizer
    copies = getattr(optimizer, "fp32_partitioned_groups_flat", None) or optimizer.single_partition_of_fp32_groups
    moments = [v for state in engine.optimizer.state.values() for v in state.values() if torch.is_tensor(v) and v.dim()]
    return {
        "weights": _bytes([t for p in student.parameters() for t in (p.data, getattr(p, "ds_tensor", None))]),
        "optimizer": _bytes([*copies, *moments]),
        "gradients": gradients,
    }


def _gradients(optimizer: Any) -> int:
    """The sums of gradients over micro-batches: one flat buffer under ZeRO-3, lists by group under ZeRO-2."""
    flat = getattr(optimizer, "grad_partitions_flat_buffer", None)
    if flat is not None:
        return _bytes([flat])
    return _bytes([t for group in optimizer.averaged_gradients.values() for t in group or ()])


def _bytes(tensors: list[torch.Tensor | None]) -> int:
    """Bytes of the storages, each once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t is not None}
    return sum(storages.values())


if __name__ == "__main__":
    main(globals())
