"""The time and the memory of every decoding method relative to greedy decoding.

    OMP_NUM_THREADS=1 python -m tools.benchmarks.decoding --output tools/benchmarks/results/decoding.json
    python -m tools.benchmarks.decoding --students llava --output decoding_gpu.json     # on a GPU
    python -m tools.benchmarks.decoding --students '[models/smollm2]' --precision bf16 --output decoding_smollm2.json

All methods answer the same batch in turns, with their published settings and the same number of new tokens. Further
forms are PAI without its second view (`pai, gamma 1`), SECOND that selects once (`second, once`) and beam search
(`5 beams`). Questions are random, also those in which CAI has found its heads before, and no answer ends early. A ratio
is the median over the rounds of the ratio to greedy decoding in the same round. On a CPU the time is that of this
process, which does not count others; memory is the peak of the bytes in tensors. On a GPU the time is that of a clock,
and memory what torch reports. The weights do not count.

- phantom: the packaged student, 64 image tokens.
- wide: 576 image tokens, width 512, 6 blocks, random weights.
- llava: random weights of LLaVA-Med's shape.
- any other word is the folder of a student.
"""

from __future__ import annotations

import json
import platform
import shlex
import statistics
import sys
import time
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from jsonargparse import auto_cli
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig

from medalign import distributed
from medalign.config import StudentConfig
from medalign.contracts import Batch
from medalign.decoding.base import Decoding
from medalign.decoding.caption_heads import FOLDS, Pair, find_heads
from medalign.decoding.methods.cai import CAI
from medalign.decoding.methods.pai import PAI
from medalign.decoding.methods.second import SECOND
from medalign.decoding.registry import METHODS, find_method
from medalign.errors import ConfigError
from medalign.student.model import Student
from tools.benchmarks.step import models
from tools.benchmarks.step.models import LLAVA, Text
from tools.benchmarks.step.utilization import card_name

MAKERS: dict[str, Callable[[StudentConfig, torch.device, torch.dtype], Student]] = {
    "phantom": models.packaged_student,
    "wide": models.wide_student,
    "llava": lambda config, device, dtype: models.random_student(LLAVA, config, device, dtype),
}
FORMS = {
    "pai, gamma 1": Decoding(method=PAI(gamma=1.0)),
    "second, once": Decoding(method=SECOND(reselect=False)),
    "5 beams": Decoding(num_beams=5),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class LiveBytes(TorchDispatchMode):
    """`peak`: the most bytes behind the tensors that were made inside the context and were alive at the same time."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = self._now = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        before = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if torch.is_tensor(leaf)}
        for leaf in tree_leaves(result):
            if torch.is_tensor(leaf) and leaf.untyped_storage()._cdata not in before | self._known:
                self._count(leaf.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        address, size = storage._cdata, storage.nbytes()
        self._known.add(address)
        self._now += size
        self.peak = max(self.peak, self._now)
        weakref.finalize(storage, self._forget, address, size)

    def _forget(self, address: int, size: int) -> None:
        self._known.discard(address)
        self._now -= size


def main(
    output: Path,
    students: list[str] | None = None,
    methods: list[str] | None = None,
    samples: int = 8,
    new_tokens: int = 24,
    rounds: int = 5,
    precision: Literal["fp32", "bf16"] | None = None,
) -> None:
    """Measure the methods and write the result.

    Args:
        output: JSON file to write.
        students: names or folders; phantom and wide by default.
        methods: all registered ones and the further forms by default. Greedy decoding is always measured.
        samples: questions in the batch.
        new_tokens: tokens of each answer.
        rounds: how often each method answers the batch, after once without measuring.
        precision: of the weights; by default bf16 on a GPU and fp32 on a CPU.
    """
    torch.manual_seed(0)
    dtype = DTYPES[precision or ("bf16" if distributed.device().type == "cuda" else "fp32")]
    names = ["greedy", *(name for name in methods or [*METHODS, *FORMS] if name != "greedy")]
    result: dict[str, Any] = {
        "command": shlex.join(["python", "-m", "tools.benchmarks.decoding", *sys.argv[1:]]),
        "machine": f"{card_name(distributed.device())}, {platform.machine()}, {torch.get_num_threads()} threads",
        "samples": samples,
        "new_tokens": new_tokens,
        "students": {},
    }
    for name in students or ["phantom", "wide"]:  # the file is complete after each student
        result["students"][Path(name).name] = _measure(name, dtype, names, samples, new_tokens, rounds)
        output.write_text(json.dumps(result, indent=2) + "\n")


def _measure(
    name: str, dtype: torch.dtype, names: list[str], samples: int, new_tokens: int, rounds: int
) -> dict[str, Any]:
    device = distributed.device()
    config = models.settings(samples, "cpu", layer=models.tapped_layer(_blocks(name))).student
    if name not in MAKERS:
        config = replace(config, path=name)
    student = MAKERS.get(name, models.packaged_student)(config, device, dtype).to(device).eval()
    student.spec.model.generation_config.eos_token_id = None  # no answer ends early
    batch = models.make_batch(student, 0, samples, Text(question=24, answer=0)).to(device)
    methods, refused = {}, {}
    for each in names:
        decoding = FORMS.get(each) or Decoding(method=find_method(each)())
        try:
            if each == CAI.name:
                decoding = Decoding(method=_with_heads(student))
            else:
                decoding.method.check(student.spec, config)
        except ConfigError as error:
            refused[each] = str(error)
        else:
            methods[each] = replace(decoding, max_new_tokens=new_tokens)
    seconds = [{each: _time(student, batch, methods[each]) for each in methods} for _ in range(rounds + 1)][1:]
    peaks = {each: _memory(student, batch, methods[each]) for each in methods}
    rows = {}
    for each in methods:
        ratios = sorted(turn[each] / turn["greedy"] for turn in seconds)
        rows[each] = {
            "time": round(statistics.median(ratios), 2),
            "time_range": [round(ratios[0], 2), round(ratios[-1], 2)],
            "memory": round(peaks[each] / peaks["greedy"], 2),
        }
    tokens = {"image_tokens": student.spec.image.count, "prompt_tokens": batch.input_ids.shape[1]}
    return {**tokens, "dtype": str(dtype).removeprefix("torch."), "over_greedy": rows, "refused": refused}


def _with_heads(student: Student) -> CAI:
    """Return CAI with the heads that it finds in random questions, which are in no shards."""
    views = [models.make_batch(student, 0, 2 * FOLDS, Text(question=24, answer=0)) for _ in range(2)]
    return CAI(found=find_heads(student, [Pair(*views)], CAI.share))


def _blocks(name: str) -> int:
    """Return the number of decoder blocks of a student."""
    if name in MAKERS:
        return LLAVA.blocks if name == "llava" else 4
    blocks: int = AutoConfig.from_pretrained(name).get_text_config().num_hidden_layers
    return blocks


def _answer(student: Student, batch: Batch, decoding: Decoding) -> None:
    ids, _ = decoding.method.generate(student, batch, decoding, pad_token_id=0, eos_token_id=None)
    assert ids.shape[1] == decoding.max_new_tokens


def _time(student: Student, batch: Batch, decoding: Decoding) -> float:
    """Return the seconds of an answer."""
    on_gpu = batch.input_ids.is_cuda
    clock = time.perf_counter if on_gpu else time.process_time
    if on_gpu:
        torch.cuda.synchronize()
    began = clock()
    _answer(student, batch, decoding)
    if on_gpu:
        torch.cuda.synchronize()
    return clock() - began


def _memory(student: Student, batch: Batch, decoding: Decoding) -> int:
    """Return the peak of the bytes that an answer needs."""
    if not batch.input_ids.is_cuda:
        with LiveBytes() as live:
            _answer(student, batch, decoding)
        return live.peak
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    _answer(student, batch, decoding)
    return torch.cuda.max_memory_allocated() - before


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
