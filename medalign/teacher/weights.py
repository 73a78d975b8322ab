"""Reads the weight files of teachers, and loads them so that nothing is missing and nothing is left over.

Code in a file is never run: a torch file is read with `weights_only`, and what its pickle may name is listed here.
"""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from medalign.errors import CheckpointError

VISION = "visual."  # the vision tower in the files of open_clip and of those who trained with it
# Everything else in these files: text towers under the names of open_clip, UniMed-CLIP and OpenAI, what PMC-CLIP adds,
# and scalars.
TEXT = (
    "text.",
    "text_encoder.",
    "transformer.",
    "token_embedding.",
    "positional_embedding",
    "ln_final.",
    "text_projection",
    "attn_mask",
    "logit_scale",
    "logit_bias",
    "input_resolution",
    "context_length",
    "vocab_size",
    "mlm_projection",
    "img_special_token",
    "fusion_module.",
)
_WRAPPERS = ("module.", "_orig_mod.")  # DistributedDataParallel, torch.compile
# A NumPy scalar of type float64, as the optimizer's state holds one where a schedule computed the learning rate with
# NumPy. NumPy 2 has moved the function, and a file has the name from when it was written.
_SCALAR: Any = np.float64(0).__reduce__()[0]
_SAFE: list[Any] = [
    (_SCALAR, "numpy.core.multiarray.scalar"),
    (_SCALAR, "numpy._core.multiarray.scalar"),
    np.dtype,
    type(np.dtype(np.float64)),
]
_MAX_NAMES = 6  # weights listed in an error message


def read_weights(file: Path) -> dict[str, torch.Tensor]:
    """Read the weights of a model from a safetensors file or a torch file.

    A torch file is mapped into memory, so that only the tensors in use are read: a training checkpoint holds the
    optimizer's state too. The names lose the prefixes of DistributedDataParallel and torch.compile.

    Args:
        file: the file; it may hold the weights themselves, or a dictionary with them as `state_dict`.

    Raises:
        CheckpointError: the file is missing, damaged, a TorchScript archive, holds pickled code, or holds no weights.
    """
    if not file.is_file():
        raise CheckpointError(f"teacher weights {file} do not exist; copy the model's weights there")
    state = _load_safetensors(file) if file.suffix == ".safetensors" else _load_torch(file)
    state = state.get("state_dict", state) if isinstance(state, Mapping) else state
    if not isinstance(state, Mapping):
        raise CheckpointError(
            f"teacher weights {file} hold a {type(state).__name__}, not the weights of a model by name"
        )
    tensors = {key: value for key, value in state.items() if isinstance(value, torch.Tensor)}
    return {_unwrapped(str(key)): value for key, value in tensors.items()}


def _load_safetensors(file: Path) -> dict[str, torch.Tensor]:
    """Read a safetensors file. Raises CheckpointError if it is damaged."""
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"teacher weights {file} cannot be read: {error}") from error


def load_exactly(
    module: nn.Module,
    state: Mapping[str, torch.Tensor],
    file: Path,
    *,
    prefix: str = VISION,
    others: Iterable[str] = TEXT,
) -> None:
    """Copy the weights under `prefix` into a module; each of its weights must be there, and no other.

    Args:
        module: the module, with its own names.
        state: the weights of the whole model.
        file: where they come from, for error messages.
        prefix: the name of the module inside the model.
        others: prefixes of weights that belong to other parts of the model, which are not needed.

    Raises:
        CheckpointError: lists weights that are missing, unexpected, or of another shape.
    """
    found = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    foreign = [key for key in state if not key.startswith((prefix, *others))]
    expected = module.state_dict()
    if not found:
        raise CheckpointError(
            f"teacher weights {file}: no name begins with {prefix!r}; they are named {_listed(sorted(state))}, and are "
            "not those of a CLIP in open_clip's format"
        )
    missing = [prefix + key for key in expected if key not in found]
    unexpected = sorted(prefix + key for key in found if key not in expected) + sorted(foreign)
    shapes = [
        f"{prefix}{key} {list(found[key].shape)}, expected {list(value.shape)}"
        for key, value in expected.items()
        if key in found and found[key].shape != value.shape
    ]
    if misfit := describe_misfit(missing, unexpected, shapes):
        raise CheckpointError(f"teacher weights {file} do not fit the tower of the teacher's configuration: {misfit}")
    module.load_state_dict(found)


def describe_misfit(missing: Sequence[str], unexpected: Sequence[str], shapes: Sequence[str]) -> str:
    """List the weights that do not fit a model, by what is wrong with them; empty if there are none."""
    faults = {"missing": missing, "unexpected": unexpected, "of another shape": shapes}
    return "; ".join(f"{len(names)} {fault}: {_listed(names)}" for fault, names in faults.items() if names)


def refused_code(error: pickle.UnpicklingError) -> str:
    """Describe what a torch file holds beside tensors, without torch's advice to load the file unsafely."""
    lines = [line.strip() for line in str(error).splitlines() if "Unsupported" in line]
    found = lines[0].partition(" Please use")[0] if lines else str(error).partition("\n")[0]
    return (
        f"{found} Code in a file is never run; where the file was written, save the weights only "
        "(torch.save(model.state_dict(), FILE)) or convert them to safetensors"
    )


def _unwrapped(key: str) -> str:
    for prefix in _WRAPPERS:
        key = key.removeprefix(prefix)
    return key


def _load_torch(file: Path) -> Any:
    archive = zipfile.is_zipfile(file)
    if archive and _is_torchscript(file):
        raise CheckpointError(
            f"teacher weights {file} are a TorchScript archive, as OpenAI publishes its CLIP: it holds code, which is "
            "not run. Convert it once, if you trust where it comes from, and give the new file: "
            "torch.save(torch.jit.load('OLD.pt', 'cpu').state_dict(), 'NEW.pt')"
        )
    try:
        with torch.serialization.safe_globals(_SAFE):
            return torch.load(file, "cpu", weights_only=True, mmap=archive)
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"teacher weights {file} cannot be read: {refused_code(error)}") from error
    except (OSError, RuntimeError, EOFError, ValueError, KeyError) as error:
        reason = str(error).partition("\n")[0]
        raise CheckpointError(f"teacher weights {file} cannot be read: {reason}") from error


def _is_torchscript(file: Path) -> bool:
    with zipfile.ZipFile(file) as archive:
        return any(name.endswith("constants.pkl") for name in archive.namelist())


def _listed(names: Sequence[str]) -> str:
    more = len(names) - _MAX_NAMES
    return ", ".join(names[:_MAX_NAMES]) + (f" and {more} more" if more > 0 else "")
