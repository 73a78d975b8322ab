"""The trained student as files that stand alone beside the base model, safetensors and JSON.

adapter_model.safetensors, adapter_config.json   LoRA, as peft reads it
medalign.safetensors                             W, the query mixture, the projector where it was trained
medalign.json                                    the student's settings: base model, layer, epsilon, longest sample,
                                                 and the precision of the run
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from medalign.config import DataConfig, LoraConfig, StudentConfig
from medalign.errors import CheckpointError, ConfigError
from medalign.run_folder import CheckpointFolder, RunFolder
from medalign.student import loading
from medalign.student.checks import check_student
from medalign.student.model import Student

_FORMAT = 1


def write(
    student: Student, whole: Mapping[str, torch.Tensor], config: StudentConfig, max_length: int, folder: Path
) -> None:
    """Write an export. `whole` holds everything that learns, gathered, by its name in the student.

    `max_length` is the longest sample that it was trained on, in tokens.
    """
    folder.mkdir(parents=True, exist_ok=True)
    adapters = loading.adapter_state(student, whole)
    groups = {name: group for group, named in student.trainable().items() for name, _ in named}
    others = {name: value.contiguous() for name, value in whole.items() if groups[name] != "adapters"}
    save_file({name: value.contiguous() for name, value in adapters.items()}, folder / "adapter_model.safetensors")
    save_file(others, folder / "medalign.safetensors")
    loading.save_adapter_config(student, folder)
    values = {"format": _FORMAT, "dtype": str(student.dtype).removeprefix("torch.")}
    values |= {"student": asdict(config), "max_length": max_length}
    (folder / "medalign.json").write_text(json.dumps(values, indent=2) + "\n")


def find(run: Path) -> Path:
    """The export that a path means: an export itself, a checkpoint, or a run (its latest checkpoint)."""
    checkpoints = RunFolder(run).checkpoints
    latest = checkpoints.read_latest()
    candidates = [run, CheckpointFolder(run).export, *([latest.export] if latest else [])]
    for folder in candidates:
        if (folder / "medalign.json").is_file():
            return folder
    raise CheckpointError(f"{run} holds no trained student: not an export, and no checkpoint under {checkpoints.path}")


def settings(folder: Path) -> StudentConfig:
    """The student's settings as they were trained. Raises CheckpointError if their file is damaged or newer."""
    try:
        student = _values(folder)["student"]
        return StudentConfig(**{**student, "lora": LoraConfig(**student["lora"])})
    except (TypeError, KeyError) as error:
        raise _unreadable(folder, error) from error


def max_length(folder: Path) -> int:
    """The longest sample that the student was trained on, in tokens; the default where the export does not say."""
    return int(_values(folder).get("max_length", DataConfig().max_length))


def precision(folder: Path) -> torch.dtype:
    """The precision of the run; where the export does not say, bf16 on a GPU and fp32 on a CPU."""
    known = {"bfloat16": torch.bfloat16, "float32": torch.float32}
    try:
        return known[_values(folder).get("dtype", "bfloat16" if torch.cuda.is_available() else "float32")]
    except (KeyError, TypeError) as error:
        raise _unreadable(folder, error) from error


def read(folder: Path, dtype: torch.dtype, device: torch.device, base: str | None = None) -> Student:
    """The trained student, ready to answer. `base` replaces the base model's folder where it has moved."""
    config = settings(folder)
    if base is not None:
        config.path = base
    check_student(config)
    student = loading.load_student(config, dtype)
    loading.set_adapter_state(student, _safetensors(folder / "adapter_model.safetensors"))
    others = _safetensors(folder / "medalign.safetensors")
    wanted = {name for group, named in student.trainable().items() if group != "adapters" for name, _ in named}
    if wanted != set(others):
        odd = sorted(wanted ^ set(others))[0]
        raise CheckpointError(
            f"{folder / 'medalign.safetensors'} does not fit its settings: {odd!r} is missing or unknown"
        )
    student.load_state_dict(others, strict=False)
    return student.to(device).eval()


def copy(source: Path, output: Path) -> None:
    """An export as a folder of its own."""
    _require_new(output)
    shutil.copytree(source, output, dirs_exist_ok=True)


def merge(source: Path, output: Path, base: str | None = None) -> None:
    """The student as an ordinary HF folder: adapters folded into the weights, processor beside them.

    Raises ConfigError if W or the mixture is on: they act on some tokens alone, so no plain weight can hold them.
    """
    config = settings(source)
    if config.steering or config.query_mixture:
        part = "student.steering (W)" if config.steering else "student.query_mixture"
        raise ConfigError(
            f"{part} is on in {source}, and it cannot be folded into plain weights; export without --merge"
        )
    _require_new(output)
    student = read(source, torch.float32, torch.device("cpu"), base)
    config.path = base or config.path
    processor = loading.load_processor(config)
    loading.merged(student).save_pretrained(output)
    processor.save_pretrained(output)


def _values(folder: Path) -> dict[str, Any]:
    path = folder / "medalign.json"
    try:
        values = json.loads(path.read_text())
        found = values["format"]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise _unreadable(folder, error) from error
    if found != _FORMAT:
        raise CheckpointError(
            f"{path} has format {found}, this version of medalign reads {_FORMAT}; use the version that wrote it"
        )
    return values


def _unreadable(folder: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"{folder / 'medalign.json'} cannot be read ({error}): it is damaged, or of a newer version; "
        "export the run again"
    )


def _require_new(output: Path) -> None:
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise CheckpointError(f"{output} is there already and no empty folder; name a new one")


def _safetensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
