"""The memory of each rank while a student is read under ZeRO-3, beside its share and one file of the checkpoint.

python -m tools.benchmarks.loading_memory --output tools/benchmarks/results/loading_memory.json

Writes a LLaVA of random bf16 weights in several files, reads it with two ranks on the CPU, and deletes it. The memory
is that of the process only (RssAnon of /proc/self/status). Pages of the files that are mapped are part of the page
cache, which the system frees when it needs to; `mapped` is their largest size.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from tools.benchmarks.ranks import launch

MIB = 2**20


def write_model(folder: Path, blocks: int, file_mb: int) -> None:
    """Write a LLaVA whose language model has blocks of 51 million parameters."""
    import torch
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    vision = CLIPVisionConfig(
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=112,
        patch_size=14,
    )
    text = LlamaConfig(
        vocab_size=32000,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=blocks,
        num_attention_heads=16,
        num_key_value_heads=16,
    )
    torch.set_default_dtype(torch.bfloat16)
    settings: dict[str, Any] = {"vision_config": vision, "text_config": text, "image_token_id": 31999}
    model = LlavaForConditionalGeneration(LlavaConfig(**settings))
    model.save_pretrained(folder, max_shard_size=f"{file_mb}MB")


def resident(kind: str) -> int:
    """Return the resident bytes of this process: RssAnon, its own, or RssFile, pages of files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(kind))


class Peak:
    """Samples the memory of this process every few milliseconds."""

    def __init__(self) -> None:
        self.start = self.most = resident("RssAnon")
        self.files = self.mapped = resident("RssFile")
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()

    def _watch(self) -> None:
        while not self._done.wait(0.005):
            self.most = max(self.most, resident("RssAnon"))
            self.mapped = max(self.mapped, resident("RssFile"))

    def stop(self) -> dict[str, float]:
        """Return MiB above the start: at the peak, of mapped files, and now."""
        self._done.set()
        self._thread.join()
        left = resident("RssAnon") - self.start
        sizes = {"peak": self.most - self.start, "mapped": self.mapped - self.files, "left": left}
        return {name: round(size / MIB) for name, size in sizes.items()}


def measure_rank(folder: Path) -> dict[str, Any]:
    """Read the student on this rank, in a process of its own."""
    import torch

    from medalign.config import Config
    from medalign.engine import engine as door
    from medalign.engine.settings import deepspeed_settings
    from medalign.student.loading import load_student

    config = Config()
    config.student.path, config.student.layer = str(folder), 1
    config.train.precision, config.engine.deepspeed = "bf16", "zero3"
    settings = deepspeed_settings(config, int(os.environ["WORLD_SIZE"]))
    door.start(settings)
    torch.distributed.barrier()
    peak, began = Peak(), time.perf_counter()
    with door.sharded_loading(settings):
        student = load_student(config.student, torch.bfloat16)
    seconds = time.perf_counter() - began
    found: dict[str, Any] = peak.stop()
    share = sum(getattr(p, "ds_tensor", p).numel() * p.element_size() for p in student.parameters())
    door.stop()
    return found | {"share": round(share / MIB), "seconds": round(seconds, 1)}


def main(output: Path, blocks: int = 8, file_mb: int = 250) -> None:
    """Write the model, and measure two ranks.

    Args:
        output: the result file (JSON).
        blocks: number of blocks of 51 million parameters.
        file_mb: largest size of a file of the checkpoint, in MB.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_model(folder, blocks, file_mb)
        files = sorted((path.stat().st_size for path in folder.glob("*.safetensors")), reverse=True)
        result = {
            "command": f"python -m tools.benchmarks.loading_memory --blocks {blocks} --file_mb {file_mb}",
            "mib": {"checkpoint": round(sum(files) / MIB), "largest_file": round(files[0] / MIB)},
            "mib_above_start_by_rank": launch("tools.benchmarks.loading_memory", [str(folder)], 2),
        }
    output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--rank"]:
        print(json.dumps(measure_rank(Path(sys.argv[2]))))
    else:
        from jsonargparse import auto_cli

        auto_cli(main, as_positional=False)
