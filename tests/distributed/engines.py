"""The workers of test_engine.py: engines with two small layers, without a student."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from deepspeed.utils import safe_get_full_optimizer_state
from torch import nn

from medalign import distributed
from medalign.config import Config
from medalign.engine import engine as door
from medalign.engine.engine import Engine
from medalign.engine.settings import deepspeed_settings
from medalign.engine.universal import to_universal
from tests.distributed.workers import main

MICRO_BATCHES = 64  # of one sample per rank and step
RATES = {"first": 1e-3, "second": 1e-2}
DECAYS = {"first": 0.5, "second": 0.0}


def accumulated(settings: dict[str, Any]) -> dict[str, float]:
    """Return the relative error of the gradient that Adam receives, by configuration."""
    door.start({})
    results = {}
    for name in settings["engines"]:
        engine = _engine(name, "bf16", MICRO_BATCHES, one_group=True)
        for micro_batch in range(MICRO_BATCHES):
            engine.backward(_loss(engine, distributed.rank(), micro_batch))
            engine.step(RATES)
        results[name] = _error(engine)
    door.stop()
    return results


def _engine(
    name: str, precision: Literal["bf16", "fp32"], micro_batches: int = 1, *, one_group: bool = False
) -> Engine:
    config = Config()
    config.engine.deepspeed, config.train.precision = name, precision
    config.train.batch_size, config.train.micro_batch_size = micro_batches * distributed.world_size(), 1
    config.train.max_grad_norm = 0.0
    layers = _layers(torch.bfloat16 if precision == "bf16" else torch.float32)
    groups = [
        {"name": group, "params": list(layer.parameters()), "lr": RATES[group], "weight_decay": DECAYS[group]}
        for group, layer in ([("first", layers)] if one_group else zip(RATES, layers, strict=True))
    ]
    return Engine(layers, groups, deepspeed_settings(config, distributed.world_size()))


def _layers(dtype: torch.dtype) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 20, bias=False), nn.Linear(20, 8, bias=False)).to(dtype)


def _loss(model: Any, rank: int, micro_batch: int) -> torch.Tensor:
    draw = torch.Generator().manual_seed(1000 * rank + micro_batch)
    dtype = next((model.student if isinstance(model, Engine) else model).parameters()).dtype
    source, target = (torch.randn(1, width, generator=draw).to(dtype) for width in (12, 8))
    return (model(source) - target).float().square().mean()


def _gradients() -> Iterator[list[torch.Tensor]]:
    layers = _layers(torch.bfloat16)
    for rank in range(distributed.world_size()):
        for micro_batch in range(MICRO_BATCHES):
            yield [g.double() for g in torch.autograd.grad(_loss(layers, rank, micro_batch), list(layers.parameters()))]


def _error(engine: Engine) -> float:
    """Compare with the exact mean. The first moment after the first update is a tenth of its gradient."""
    exact = [sum(parts) / (MICRO_BATCHES * distributed.world_size()) for parts in zip(*_gradients(), strict=True)]
    errors = []
    for parameter, wanted in zip(engine.student.parameters(), exact, strict=True):
        found = 10 * safe_get_full_optimizer_state(parameter, "exp_avg").double()
        errors.append(float((found - wanted).norm() / wanted.norm()))
    return max(errors)


def reloaded(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the optimizer's groups and counters after two updates, a save, a load, and one more update."""
    door.start({})
    results: dict[str, Any] = {}
    for name in settings["engines"]:
        folder = Path(settings["folder"]) / name
        trained = _engine(name, "fp32")
        _update(trained, 2)
        _save(trained, folder / "saved")
        to_universal(folder / "saved", folder / "universal", distributed.raise_on_all_ranks)
        distributed.barrier()
        results[f"{name} universal"] = _loaded(name, folder / "universal", universal=True)
        for group in trained.optimizer.param_groups:
            group.update(name="first", weight_decay=0.5)
        for state in trained.optimizer.state.values():
            state["step"] += 2
        _save(trained, folder / "wrong")
        results[f"{name} wrong"] = _loaded(name, folder / "wrong", universal=False)
    door.stop()
    return results


def _save(engine: Engine, folder: Path) -> None:
    for write in engine.capture(folder, copy=False):
        write()
    distributed.barrier()


def _loaded(name: str, folder: Path, *, universal: bool) -> dict[str, Any]:
    engine = _engine(name, "fp32")
    engine.load(folder, universal=universal)
    loaded = [float(state["step"]) for state in engine.optimizer.state.values()]
    _update(engine, 1)
    return {
        "groups": {group["name"]: [group["lr"], group["weight_decay"]] for group in engine.optimizer.param_groups},
        "rates": engine.rates(),
        "steps": [loaded, [float(state["step"]) for state in engine.optimizer.state.values()]],
    }


def _update(engine: Engine, times: int) -> None:
    for time in range(times):
        engine.backward(_loss(engine, distributed.rank(), time))
        engine.step(RATES)


if __name__ == "__main__":
    main(globals())
