"""The time from the start of the processes to the first step of a student of 1 GB, by part, on one rank and on two.

python -m tools.benchmarks.start_time --output tools/benchmarks/results/start_time.json

Writes a LLaVA of random bf16 weights with tokenizer, processor and chat template, and trains it for two steps as
`medalign train` does, under ZeRO-3 on the CPU. "Cold": the student's files are evicted from the page cache before;
libraries are not, because other processes use them. Beside it, the time to read the same files once.

A busy machine only adds to the seconds since the start, so the least of the rounds is the best estimate; the most is
given too. The processor's seconds are those of the rank with the most, and depend less on what else runs.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tools.benchmarks.loading_memory import MIB, write_model
from tools.benchmarks.ranks import launch, process_start

STEPS = 2
WORDS = (
    "--train.batch_size=2",
    "--train.micro_batch_size=1",
    "--train.precision=bf16",
    f"--train.steps={STEPS}",
    "--student.layer=4",
    "--log.wandb=off",
    "--checkpoint.interval=1000",
    "--checkpoint.asynchronous=false",
)


def write_processor(folder: Path) -> None:
    """Write tokenizer, image settings and chat template for the LLaVA whose configuration is in a folder."""
    from transformers import CLIPImageProcessor, LlavaConfig, LlavaProcessor

    import medalign

    config: Any = LlavaConfig.from_pretrained(folder)
    template = Path(medalign.__file__).with_name("assets") / "phantom_student" / "chat_template.jinja"
    size = config.vision_config.image_size
    LlavaProcessor(
        image_processor=CLIPImageProcessor(size={"shortest_edge": size}, crop_size={"height": size, "width": size}),
        tokenizer=_tokenizer(config.text_config.vocab_size, config.image_token_id),
        patch_size=config.vision_config.patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template.read_text(encoding="utf-8"),
    ).save_pretrained(folder)


def _tokenizer(size: int, image: int) -> Any:
    """Build a tokenizer with a token per row of the embedding. It writes bytes; the other tokens are never written."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = ["<unk>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    names += [f"<free {number}>" for number in range(len(names), size)]
    names[image] = "<image>"
    backend = Tokenizer(models.BPE({name: number for number, name in enumerate(names)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<unk>", "<s>", "</s>", "<image>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        pad_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens={"image_token": "<image>"},
    )


def measure_rank(words: list[str]) -> dict[str, dict[str, float]]:
    """Train on this rank, in a process of its own. Returns seconds since its start, and those of the processor."""
    began = process_start()
    from medalign import assembly, config
    from medalign.run import train
    from medalign.training.callbacks import Callback

    marks: dict[str, float] = {}
    processor: dict[str, float] = {}

    def mark(what: str) -> None:
        marks[what], processor[what] = time.time() - began, time.process_time()

    def marked(real: Callable[..., Any], what: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            found = real(*args, **kwargs)
            mark(what)
            return found

        return call

    class Marks(Callback):
        def on_train_start(self, trainer: Any) -> None:
            mark("training begins")

        def on_step_end(self, trainer: Any) -> None:
            mark(f"step {trainer.state.step}")

    mark("imports")
    parts: Any = assembly
    parts.loading.load_student = marked(parts.loading.load_student, "student read")
    parts.Engine = marked(parts.Engine, "engine built")
    train(config.load("phantom", words), [Marks()])
    return {"wall": marks, "processor": processor}


def evict(folder: Path) -> None:
    """Remove the files of a folder from the page cache; no other process may have them mapped."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_once(folder: Path) -> float:
    """Return the seconds in which the weights are read once, one file after another."""
    began = time.perf_counter()
    buffer = bytearray(16 * MIB)
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return time.perf_counter() - began


def one_round(student: Path, words: list[str]) -> dict[str, dict[str, dict[str, float]]]:
    """Measure each case once: 1 and 2 ranks, a cold and a warm cache."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for world in (1, 2):
        evict(student)
        read = {"cold": read_once(student), "warm": read_once(student)}
        evict(student)
        for cache in ("cold", "warm"):  # the first run reads the files into the cache
            with tempfile.TemporaryDirectory() as run:
                ranks = launch("tools.benchmarks.start_time", [*words, f"--run.dir={run}/run"], world)
            seconds = {clock: slowest([rank[clock] for rank in ranks]) for clock in ranks[0]}
            found[f"{world} ranks, {cache}"] = seconds | {"files": {"read once": read[cache]}}
    return found


def slowest(ranks: list[dict[str, float]]) -> dict[str, float]:
    """Return the most of each part over the ranks."""
    return {what: max(rank[what] for rank in ranks) for what in ranks[0]}


def main(output: Path, blocks: int = 8, rounds: int = 3) -> None:
    """Write the student, and measure.

    Args:
        output: the result file (JSON).
        blocks: number of blocks of 51 million parameters.
        rounds: number of runs of each case.
    """
    from medalign import phantom

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        student = folder / "student"
        write_model(student, blocks, 250)
        write_processor(student)
        phantom.write_phantoms(folder / "data", 8, 1, 0)
        words = [*WORDS, f"--student.path={student}", f"--data.train={folder}/data/train"]
        runs = [one_round(student, words) for _ in range(rounds)]
        size = sum(path.stat().st_size for path in student.glob("*.safetensors"))
    result = {
        "command": f"python -m tools.benchmarks.start_time --blocks {blocks} --rounds {rounds}",
        "settings": " ".join(WORDS),
        "checkpoint_mib": round(size / MIB),
        "seconds_least_and_most": {case: extremes([run[case] for run in runs]) for case in runs[0]},
    }
    output.write_text(json.dumps(result, indent=1) + "\n")


def extremes(rounds: list[dict[str, dict[str, float]]]) -> dict[str, dict[str, list[float]]]:
    """Return the least and the most of each part over the rounds."""
    return {
        clock: {
            what: [round(extreme(each[clock][what] for each in rounds), 2) for extreme in (min, max)] for what in parts
        }
        for clock, parts in rounds[0].items()
    }


if __name__ == "__main__":
    if sys.argv[1:2] == ["--rank"]:
        print(json.dumps(measure_rank(sys.argv[2:])))
    else:
        from jsonargparse import auto_cli

        auto_cli(main, as_positional=False)
