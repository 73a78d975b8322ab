"""Exports of a trained student: safetensors and JSON files that need only the base model.

adapter_model.safetensors, adapter_config.json   LoRA, in peft's format, if it was trained
medalign.safetensors                             all else that was trained: W, the query mixture, the projector, the
                                                 vision tower, or the whole language model
medalign.json                                    the student's settings (base model, layer, epsilon), the maximum
                                                 length of a sample, and the precision of the run
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

from medalign.checkpoint.authors_layout import write_authors_layout
from medalign.checkpoint.integrity import verify_export
from medalign.config import DataConfig, LoraConfig, StudentConfig
from medalign.errors import CheckpointError, ConfigError
from medalign.run_folder import CheckpointFolder, RunFolder
from medalign.student import loading
from medalign.student.checks import check_student
from medalign.student.model import Student
from medalign.student.weights import family_of

_FORMAT = 1
_ADAPTER = "adapter_model.safetensors"


def write_export(
    student: Student, parameters: Mapping[str, torch.Tensor], config: StudentConfig, max_length: int, folder: Path
) -> None:
    """Write an export. Only rank 0 calls it.

    Args:
        student: the trained student.
        parameters: all trainable parameters, gathered, by their name in the student.
        config: the student's settings.
        max_length: `data.max_length` of the training, in tokens.
        folder: where to write; it is created if necessary.
    """
    folder.mkdir(parents=True, exist_ok=True)
    groups = {name: group for group, named in student.trainable().items() for name, _ in named}
    others = {name: value.contiguous() for name, value in parameters.items() if groups[name] != "adapters"}
    save_file(others, folder / "medalign.safetensors")
    if config.train == "lora":
        adapters = loading.adapter_state(student, parameters)
        save_file({name: value.contiguous() for name, value in adapters.items()}, folder / _ADAPTER)
        loading.save_adapter_config(student, folder)
    values = {"format": _FORMAT, "dtype": str(student.dtype).removeprefix("torch.")}
    values |= {"student": asdict(config), "max_length": max_length}
    (folder / "medalign.json").write_text(json.dumps(values, indent=2) + "\n")


def find_export(run: Path) -> Path:
    """Find the export in a path, which may be an export, a checkpoint, or a run (its latest checkpoint).

    Raises:
        CheckpointError: there is none.
    """
    if not run.exists():
        raise CheckpointError(f"{run} does not exist; give the folder of a run, a checkpoint or an export")
    checkpoints = RunFolder(run).checkpoints
    latest = checkpoints.read_latest()
    candidates = [run, CheckpointFolder(run).export, *([latest.export] if latest else [])]
    for folder in candidates:
        if (folder / "medalign.json").is_file():
            return folder
    raise CheckpointError(
        f"{run} contains no trained student: it is not an export, and {checkpoints.path} contains no checkpoint"
    )


def settings(folder: Path) -> StudentConfig:
    """Read the settings that the student was trained with.

    Raises:
        CheckpointError: their file is damaged or was written by a newer version.
    """
    try:
        student = _values(folder)["student"]
        return StudentConfig(**{**student, "lora": LoraConfig(**student["lora"])})
    except (TypeError, KeyError) as error:
        raise _unreadable(folder, error) from error


def max_length(folder: Path) -> int:
    """Return `data.max_length` of the training, in tokens, or its default if the export does not contain it."""
    return int(_values(folder).get("max_length", DataConfig().max_length))


def precision(folder: Path) -> torch.dtype:
    """Return the precision of the run. If the export does not contain it, this is bf16 on a GPU and fp32 on a CPU."""
    known = {"bfloat16": torch.bfloat16, "float32": torch.float32}
    try:
        return known[_values(folder).get("dtype", "bfloat16" if torch.cuda.is_available() else "float32")]
    except (KeyError, TypeError) as error:
        raise _unreadable(folder, error) from error


def load_export(
    folder: Path, dtype: torch.dtype, device: torch.device, base: str | None = None, *, quantized: bool = True
) -> Student:
    """Load the trained student in evaluation mode.

    Args:
        folder: the export.
        dtype: data type of the weights.
        device: where the student runs.
        base: folder of the base model, if it has moved since the training.
        quantized: whether a base model that was quantized in the training is quantized again.

    Raises:
        CheckpointError: the export is damaged or does not fit the base model.
        ConfigError: the base model cannot be used.
    """
    verify_export(folder)
    config = settings(folder)
    if base is not None:
        config.path = base
    if not quantized:
        config.quantization = "none"
    check_student(config)
    student = loading.load_student(config, dtype)
    if config.train == "lora":
        loading.set_adapter_state(student, _safetensors(folder / _ADAPTER))
    others = _safetensors(folder / "medalign.safetensors")
    expected = {name for group, named in student.trainable().items() if group != "adapters" for name, _ in named}
    if expected != set(others):
        name = sorted(expected ^ set(others))[0]
        problem = "is missing" if name in expected else "is not expected"
        raise CheckpointError(
            f"{folder / 'medalign.safetensors'} does not fit the settings in medalign.json: {name!r} {problem}; "
            "export the run again"
        )
    student.load_state_dict(others, strict=False)
    return student.to(device).eval()


def copy(source: Path, output: Path) -> None:
    """Copy an export to a new folder.

    Raises:
        CheckpointError: `output` exists and is not an empty folder, or the export is damaged.
    """
    _require_new(output)
    verify_export(source)
    shutil.copytree(source, output, dirs_exist_ok=True)


def merge(source: Path, output: Path, base: str | None = None, *, authors_layout: bool = False) -> None:
    """Write the student as an ordinary model folder, with the adapters merged into its weights.

    Args:
        source: the export.
        output: the new folder.
        base: folder of the base model, if it has moved since the training.
        authors_layout: write names, files and precision as in the base model's folder, if it is in the layout of its
            authors, instead of a folder of transformers.

    Raises:
        ConfigError: W or the query mixture is enabled. They act only on some tokens, so they cannot be merged. Or the
            base model's folder is in the format of transformers already.
        CheckpointError: `output` exists and is not an empty folder.
    """
    config = settings(source)
    if config.steering or config.query_mixture:
        part = "student.steering (W)" if config.steering else "student.query_mixture"
        raise ConfigError(
            f"{part} is enabled in {source} and cannot be merged into the model's weights; export without --merge"
        )
    _require_new(output)
    config.path = base or config.path
    key_mapping = family_of(config.path).key_mapping
    if authors_layout and not key_mapping:
        raise ConfigError(f"{config.path} is in the format of transformers already; export without --layout authors")
    student = load_export(source, torch.float32, torch.device("cpu"), base, quantized=False)
    processor = loading.load_processor(config)
    model = loading.merge_adapters(student)
    if authors_layout and key_mapping:
        tower_trained = config.train_vision_tower
        write_authors_layout(model, Path(config.path), key_mapping, output, tower_trained=tower_trained)
        return
    if key_mapping:
        model = _in_transformers_layout(model)
    model.save_pretrained(output)
    processor.save_pretrained(output)


def _in_transformers_layout(model: Any) -> Any:
    """Return the same model without the memory of the names that its weights had in the files it was read from."""
    with torch.device("meta"):
        fresh = type(model)(model.config)
    fresh.load_state_dict(model.state_dict(), assign=True)
    fresh.generation_config = model.generation_config
    return fresh


def _values(folder: Path) -> dict[str, Any]:
    path = folder / "medalign.json"
    try:
        values: dict[str, Any] = json.loads(path.read_text())
        found = values["format"]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise _unreadable(folder, error) from error
    if found != _FORMAT:
        raise CheckpointError(
            f"{path} has format {found}, but this version of medalign reads format {_FORMAT}; use the version that "
            "wrote it"
        )
    return values


def _unreadable(folder: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"{folder / 'medalign.json'} cannot be read ({error}): it is damaged or was written by a newer version; "
        "export the run again"
    )


def _require_new(output: Path) -> None:
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise CheckpointError(f"{output} already exists and is not an empty folder; choose a new folder")


def _safetensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
