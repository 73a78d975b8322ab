"""The models on the meta device: their parameters, and the bytes that autograd keeps for the backward pass.

Only the configuration files of the models' folders are read. The modules are those that training builds, but none of
their tensors has memory.

Shape suffixes: B samples, H heads, L tokens, D head dimension.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from medalign.config import Config
from medalign.config.schema.student import StudentConfig
from medalign.student import loading
from medalign.student.backends import attention_names
from medalign.student.files import read_object
from medalign.student.model import Student
from medalign.student.packing import without_packed_mask
from medalign.student.reading import as_config_error, silent_transformers
from medalign.student.weights import family_of
from medalign.teacher.loading import teacher_dtype
from medalign.teacher.source import find_teacher
from medalign.teacher.towers import Tower, tower_class


def student_on_meta(config: StudentConfig, dtype: torch.dtype) -> Student:
    """Build the student with its adapters on the meta device. The folder needs only the files of its configuration.

    Raises:
        ConfigError: the folder has no config.json, or no student can be built from it.
    """
    folder = loading.model_folder(config)
    family = family_of(folder)
    with as_config_error(f"student.path {folder} cannot be read as a model"), silent_transformers():
        family.check(Path(folder), read_object(Path(folder) / "config.json"))
        settings = family.config(Path(folder), config)
        build: Any = getattr(family.model_class, "from_config", None) or family.model_class._from_config
        with _building(dtype):
            model = build(settings, dtype=dtype, attn_implementation=attention_names("sdpa", dtype))
    with _building(dtype):
        student = loading.adapt(model, config, dtype)
    student.train()
    return student


class TeacherShape(NamedTuple):
    """A teacher on the meta device."""

    tower: Tower
    runs: bool  # False if its targets come from a cache


def teachers_on_meta(config: Config, dtype: torch.dtype = torch.float32) -> list[TeacherShape]:
    """Build the towers of all teachers on the meta device; none when nothing is distilled.

    Args:
        config: the run's settings.
        dtype: data type of the student, which a teacher has too unless its settings name another one.

    Raises:
        ConfigError: a folder is not that of a teacher.
    """
    found = []
    for settings in config.teachers:
        source = find_teacher(settings.path, settings.mean, settings.std)
        kind = tower_class(source)
        kind.check(source)
        with torch.device("meta"):
            tower = kind.build(source, settings.features)
        found.append(TeacherShape(tower.to(teacher_dtype(settings, dtype)), not settings.cache))
    return found


def teacher_on_meta(config: Config, dtype: torch.dtype = torch.float32) -> Tower | None:
    """Build the first teacher's tower as `teachers_on_meta`; None when nothing is distilled."""
    found = teachers_on_meta(config, dtype)
    return found[0].tower if found else None


def parameters(module: nn.Module, *, trainable: bool = False) -> int:
    """Count the parameters of a module, each tied one once."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not trainable)


def quantized_weights(student: Student) -> list[int]:
    """Count the weights of each layer that QLoRA reads in 4 bits: the frozen linear layers of the blocks."""
    layers = (m for block in student.spec.blocks for m in block.modules() if isinstance(m, nn.Linear))
    return [layer.weight.numel() for layer in layers if not layer.weight.requires_grad]


def vision_tokens(student: Student) -> tuple[int, int]:
    """Return how many patches the student's vision tower sees in an image, and its width."""
    settings: Any = student.spec.vision_tower.config
    patch = settings.patch_size
    side = student.spec.image_size // int(patch if isinstance(patch, int) else patch[0])
    return side**2, int(settings.hidden_size)


def vision_blocks(student: Student) -> int:
    """Return how many blocks the student's vision tower has."""
    settings: Any = student.spec.vision_tower.config
    return int(getattr(settings, "num_hidden_layers", None) or settings.depth)


@dataclass(frozen=True)
class SavedBytes:
    """Bytes that autograd keeps for the backward pass of the language model.

    Attributes:
        blocks: per decoder block, its LoRA and attention included.
        rest: outside the blocks (the final norm, masks).
        inputs: the hidden states that enter one block.
    """

    blocks: tuple[int, ...]
    rest: int
    inputs: int

    def total(self, checkpointing: bool, tapped: Sequence[int]) -> int:
        """Return the peak.

        With checkpointing, every block except the tapped ones keeps only its input, and one block at a time is
        recomputed:

            sum over other blocks of inputs + sum over tapped of blocks + max(blocks) + rest

        Args:
            checkpointing: whether blocks are recomputed in the backward pass.
            tapped: the blocks that are never recomputed.
        """
        if not checkpointing:
            return sum(self.blocks) + self.rest
        kept = sum(self.blocks[block] for block in tapped)
        return (len(self.blocks) - len(tapped)) * self.inputs + kept + max(self.blocks) + self.rest


def saved_bytes(student: Student, samples: int, length: int) -> SavedBytes:
    """Run the language model on the meta device and count the tensors that autograd saves, each storage once.

    Parameters do not count. The attention is counted as flash-attention saves it: queries, keys, values, the output,
    and one float32 per head and token. A batch without padding is assumed.

    Args:
        student: on the meta device.
        samples: samples of a micro-batch.
        length: tokens of each sample.
    """
    count = _Count(student)
    language, blocks = student.spec.language_model, list(student.spec.blocks)
    handles = [block.register_forward_pre_hook(count.enter) for block in blocks]
    handles += [block.register_forward_hook(count.leave) for block in blocks]
    hidden = torch.empty(samples, length, student.spec.width, dtype=student.dtype, device="meta")
    inputs_learn = not student.trainable().keys().isdisjoint(("projector", "vision_tower", "language_model"))
    hidden.requires_grad_(inputs_learn)  # what is before the blocks
    places = torch.empty(samples, length, dtype=torch.int64, device="meta")
    recompute = [block for block in student.model.modules() if getattr(block, "gradient_checkpointing", False)]
    try:
        for block in recompute:
            block.gradient_checkpointing = False
        one = SimpleNamespace(lengths=(length,))
        with torch.autograd.graph.saved_tensors_hooks(count.pack, _same), _MetaAttention(), without_packed_mask(one):  # type: ignore[arg-type]
            language(inputs_embeds=hidden, position_ids=places, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
        for block in recompute:
            block.gradient_checkpointing = True
    return SavedBytes(tuple(count.blocks), count.rest, hidden.nbytes)


class _Count:
    """Adds the saved bytes to the block that runs."""

    def __init__(self, student: Student) -> None:
        # The storages are kept, so that no later one can have the address of one that is gone.
        self._seen = {p.untyped_storage()._cdata: p.untyped_storage() for p in student.parameters()}
        self.blocks: list[int] = []
        self.rest = 0
        self._inside = False

    def enter(self, *_: Any) -> None:
        self.blocks.append(0)
        self._inside = True

    def leave(self, *_: Any) -> None:
        self._inside = False

    def pack(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._seen:
            self._seen[storage._cdata] = storage
            if self._inside:
                self.blocks[-1] += storage.nbytes()
            else:
                self.rest += storage.nbytes()
        return tensor


class _FlashAttention(torch.autograd.Function):
    """Saves what flash-attention saves. It runs on the meta device only, and has no backward pass."""

    @staticmethod
    def forward(ctx: Any, *inputs_BHLD: torch.Tensor) -> torch.Tensor:
        query_BHLD = inputs_BHLD[0]
        output_BHLD = torch.empty_like(query_BHLD)
        statistics_BHL = query_BHLD.new_empty(query_BHLD.shape[:3], dtype=torch.float32)
        ctx.save_for_backward(*inputs_BHLD, output_BHLD, statistics_BHL)
        return output_BHLD


class _MetaAttention(TorchFunctionMode):
    """Replaces SDPA, which on the meta device would form the whole matrix, and answers questions about values.

    The only values that transformers asks for are whether masks cover every token: they do without padding.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            return _FlashAttention.apply(*args[:3])
        if func is torch.Tensor.all:
            return torch.ones((), dtype=torch.bool)
        return func(*args, **(kwargs or {}))


@contextmanager
def _building(dtype: torch.dtype) -> Iterator[None]:
    """Build on the meta device in `dtype`; peft leaves new adapters on it in the default data type."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            yield
    finally:
        torch.set_default_dtype(before)


def _same(tensor: torch.Tensor) -> torch.Tensor:
    return tensor
