"""Makes a student's folder of an adapter that was trained with LLaVA's own code, as LLaVA-Rad's is published.

    python -m tools.merge_llava_adapter ADAPTER --base VICUNA [--tower CLIP] --output DIR

ADAPTER has adapter_config.json, adapter_model.safetensors or .bin (LoRA of the language model), non_lora_trainables.bin
or mm_projector.bin (the projector), and config.json. The base is the folder of the language model, the tower that of a
CLIP in transformers' format. LLaVA-Rad has its own tower beside the adapter and needs no --tower. The output is in the
layout of LLaVA's authors (`llava_llama`, `llava_mistral` or `llava_qwen2`, as the adapter), which medalign reads. One
shard of the base is in memory at a time. No pickle runs code: .bin and .pt files are read with weights_only.
"""

from __future__ import annotations

import argparse
import json
import math
import pickle
import re
import shutil
import sys
import zipfile
from collections.abc import Iterator, Set
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from medalign.errors import ConfigError, MedAlignError
from medalign.teacher.weights import refused_code
from tools.adapter_tower import AdapterTower, read_tower

_PEFT = "base_model.model."
_LORA = re.compile(r"(.+)\.lora_([AB])(?:\.default)?\.weight")
_TOWER = "model.vision_tower.vision_tower.vision_model."
_NOT_PLAIN = ("use_dora", "bias", "modules_to_save", "rank_pattern", "alpha_pattern")
_KINDS = {"llava": "llava_llama", **{kind: kind for kind in ("llava_llama", "llava_mistral", "llava_qwen2")}}
_COPIED = ("tokenizer*", "special_tokens_map.json", "generation_config.json")
_BUFFERS = ".rotary_emb.inv_freq"  # in the files of earlier versions of transformers; computed now


def merge(adapter: Path, base: Path, tower: Path | None, output: Path) -> None:
    """Write the folder.

    Args:
        adapter: the folder of the adapter.
        base: the language model that it was trained from.
        tower: the CLIP whose vision tower it was trained with; None if the tower's files are beside the adapter.
        output: the new folder.

    Raises:
        ConfigError: a file is missing, the adapter is not plain LoRA, or a weight of it does not fit the base.
        CheckpointError: the weights of the tower cannot be read.
    """
    if output.exists():
        raise ConfigError(f"{output} already exists; choose a new folder")
    lora, scale = _read_lora(adapter)
    vision = read_tower(tower or adapter)
    others = {**_read_projector(adapter), **{f"{_TOWER}{name}": value for name, value in vision.weights.items()}}
    if left := sorted(lora.keys() - _names(base)):
        raise ConfigError(f"{adapter} adapts {left[0]}, which {base} does not have; give the base it was trained from")
    _write_settings(adapter, base, vision, output)
    places: dict[str, str] = {}
    for number, state in enumerate(chain(_shards(base, others.keys()), [others]), start=1):
        name = f"model-{number:05d}.safetensors"
        for weight in lora.keys() & state.keys():
            state[weight] = _add(weight, state[weight], lora[weight], scale)
        save_file({key: value.contiguous() for key, value in state.items()}, output / name, metadata={"format": "pt"})
        places |= dict.fromkeys(state, name)
    (output / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


def _read_lora(adapter: Path) -> tuple[dict[str, dict[str, torch.Tensor]], float]:
    """Return the factors A and B by the name of the weight that they belong to, and alpha / r."""
    settings = _read_json(adapter / "adapter_config.json")
    more = [name for name in _NOT_PLAIN if settings.get(name) not in (None, False, "none", [], {})]
    if more:
        raise ConfigError(
            f"{adapter}: adapter_config.json: {more[0]} is {settings[more[0]]!r}; only plain LoRA can be merged: merge "
            "it with peft"
        )
    lora: dict[str, dict[str, torch.Tensor]] = {}
    for name, value in _read_weights(adapter, "adapter_model").items():
        found = _LORA.fullmatch(name)
        if found is None:
            raise ConfigError(f"{adapter}: {name} is not a weight of LoRA; merge the adapter with peft")
        lora.setdefault(f"{found[1].removeprefix(_PEFT)}.weight", {})[found[2]] = value
    rank = settings["r"]
    return lora, settings["lora_alpha"] / (math.sqrt(rank) if settings.get("use_rslora") else rank)


def _add(name: str, weight: torch.Tensor, factors: dict[str, torch.Tensor], scale: float) -> torch.Tensor:
    if factors.keys() != {"A", "B"}:
        raise ConfigError(f"the adapter of {name} lacks a factor; copy the adapter's file again")
    product = factors["B"].float() @ factors["A"].float()
    if product.shape != weight.shape:
        raise ConfigError(
            f"the adapter of {name} is of shape {list(product.shape)}, but the base has {list(weight.shape)}; give the "
            "base that it was trained from"
        )
    return (weight.float() + scale * product).to(weight.dtype)


def _read_projector(adapter: Path) -> dict[str, torch.Tensor]:
    """Return the weights of the projector, by the authors' names in a whole model."""
    for stem in ("non_lora_trainables", "mm_projector"):
        if any(adapter.glob(f"{stem}.*")):
            state = _read_weights(adapter, stem)
            break
    else:
        raise ConfigError(f"{adapter} has neither non_lora_trainables.bin nor mm_projector.bin; copy the projector")
    found = {name.removeprefix(_PEFT): value for name, value in state.items()}
    found = {name if name.startswith("model.") else f"model.{name}": value for name, value in found.items()}
    if foreign := sorted(name for name in found if not name.startswith("model.mm_projector.")):
        raise ConfigError(f"{adapter}: {foreign[0]} was trained too, which this tool does not know")
    return found


def _files(folder: Path) -> list[Path]:
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    if not files:
        raise ConfigError(f"{folder} has no safetensors files and no pytorch_model*.bin; give the folder of a model")
    return files


def _names(folder: Path) -> set[str]:
    names: set[str] = set()
    for path in _files(folder):
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                names.update(file.keys())
        else:
            names.update(_load(path))
    return names


def _shards(folder: Path, replaced: Set[str]) -> Iterator[dict[str, torch.Tensor]]:
    """Yield the weights of each file but those that the adapter's folder has: the base may be a LLaVA itself."""
    for path in _files(folder):
        state = _load(path).items()
        yield {name: value for name, value in state if name not in replaced and not name.endswith(_BUFFERS)}


def _read_weights(folder: Path, stem: str) -> dict[str, torch.Tensor]:
    for path in (folder / f"{stem}.safetensors", folder / f"{stem}.bin"):
        if path.is_file():
            return _load(path)
    raise ConfigError(f"{folder} has no {stem}.safetensors and no {stem}.bin; copy it from the adapter")


def _load(path: Path) -> dict[str, torch.Tensor]:
    if path.suffix == ".safetensors":
        return load_file(path)
    try:
        state: dict[str, torch.Tensor] = torch.load(path, "cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        raise ConfigError(f"{path} cannot be read: {refused_code(error)}") from error
    except (OSError, RuntimeError, EOFError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {str(error).splitlines()[0]}; copy it again") from error
    return state


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    return values


def _write_settings(adapter: Path, base: Path, tower: AdapterTower, output: Path) -> None:
    """Write config.json, the tokenizer of the base, and the description of the tower beside it."""
    below, own = _read_json(base / "config.json"), _read_json(adapter / "config.json")
    config = {**below, **own, "model_type": _kind(adapter, own, below), "mm_vision_tower": "vision_tower"}
    for name in ("mm_vision_tower_config", "mm_vision_tower_checkpoint"):  # files that are not needed any more
        config.pop(name, None)
    (output / "vision_tower").mkdir(parents=True)
    (output / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    tower.describe(output / "vision_tower")
    for path in chain(*map(base.glob, _COPIED)):
        shutil.copy(path, output)


def _kind(adapter: Path, own: dict[str, Any], below: dict[str, Any]) -> str:
    """Return the layout's model type, which decides the language model's class and the prompt."""
    found, base = own.get("model_type"), below.get("model_type")
    if found not in _KINDS:
        raise ConfigError(
            f"{adapter}: config.json: model_type is {found!r}; only {', '.join(_KINDS)} are known: merge the adapter "
            "with its own code"
        )
    if base not in (None, found, _KINDS[found], _KINDS[found].removeprefix("llava_")):
        raise ConfigError(
            f"{adapter}: config.json: model_type is {found!r}, but that of the base is {base!r}; give the base that it "
            "was trained from, or correct model_type"
        )
    return _KINDS[found]


def main(words: list[str] | None = None) -> int:
    """Parse the command line and merge. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapter", type=Path)
    parser.add_argument("--base", type=Path, required=True, help="folder of the language model")
    parser.add_argument("--tower", type=Path, help="folder of the CLIP; default: the tower beside the adapter")
    parser.add_argument("--output", type=Path, required=True, help="new folder")
    options = parser.parse_args(words)
    try:
        merge(options.adapter, options.base, options.tower, options.output)
    except MedAlignError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
