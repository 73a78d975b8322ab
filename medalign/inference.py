"""A trained student put to use: one question, or a whole data set. Composes rooms, like `run`."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from medalign import distributed
from medalign.checkpoint import export
from medalign.config import DataConfig
from medalign.contracts import Sample
from medalign.data.collate import Collator, TowerView
from medalign.data.index import ShardIndex
from medalign.data.prompts import PromptEncoder
from medalign.data.samples import decode_image, naming
from medalign.errors import ConfigError, DataError
from medalign.evaluation.generate import answer, predict
from medalign.evaluation.metrics import Prediction, score, write_predictions
from medalign.evaluation.pictures import overlay
from medalign.student import loading
from medalign.student.model import Student

log = logging.getLogger("medalign")


def generate(
    run: Path,
    images: Sequence[Path],
    question: str,
    picture: Path | None,
    max_new_tokens: int,
    base: str | None = None,
) -> str:
    """The answer to one question; draws its attention to the first image into `picture` if that is named."""
    if not question.strip():
        raise ConfigError("--question is empty")
    for image in images:
        if not image.is_file():
            raise DataError(f"--image {image} does not exist")
    if picture is not None:
        _require_picture(picture)
    pictures = []
    for image in images:
        with naming(f"--image {image}"):
            pictures.append(decode_image(image.read_bytes()))
    sample = Sample(images[0].stem, "none", "vqa", question, "?", "open", tuple(pictures))
    student, tokenizer, collator = open_student(run, base, len(pictures))
    given = answer(student, tokenizer, collator([sample]).to(distributed.device()), max_new_tokens)[0]
    if picture is not None and given.attention is not None:
        overlay(pictures[0], given.attention, student.anatomy.grid).save(picture)
        log.info("overlay: %s", picture)
    return given.text


def evaluate(
    run: Path,
    data: Sequence[str],
    *,
    name: str | None = None,
    batch_size: int = 32,
    limit: int | None = None,
    max_new_tokens: int = 128,
    base: str | None = None,
) -> Path:
    """Score a run on shards. Returns the folder with predictions.jsonl and scores.json."""
    if name is not None and (name in ("", ".", "..") or Path(name).name != name):
        raise ConfigError(f"--name {name} must be the plain name of a folder in {run / 'evaluation'}")
    index = ShardIndex.open(list(data))
    student, tokenizer, collator = open_student(run, base, index.most_images)
    numbers = range(len(index) if limit is None else min(limit, len(index)))
    rows: list[Prediction] = []
    with tqdm(total=len(numbers), unit="sample", desc="evaluate", disable=None) as bar:
        for answered in predict(
            student,
            tokenizer,
            index,
            collator,
            batch_size=batch_size,
            max_new_tokens=max_new_tokens,
            device=distributed.device(),
            numbers=numbers,
        ):
            rows.extend(answered)
            bar.update(len(answered))
    folder = run / "evaluation" / (name or Path(data[0]).name)
    grid = student.anatomy.grid
    facts = {
        "name": folder.name,
        "data": [str(Path(path).resolve()) for path in data],
        "grid": [grid.rows, grid.columns],
    }
    _write(folder, rows, facts | {"unreadable": len(numbers) - len(rows)})
    return folder


def open_student(run: Path, base: str | None = None, most_images: int = 1) -> tuple[Student, Any, Collator]:
    """The trained student of a run, its tokenizer, and a collator for questions without answers.

    A question has the room that it has by default beside one image, and each of `most_images` after that its own.
    """
    source = export.find(run)
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    student = export.read(source, dtype, distributed.device(), base)
    config = export.settings(source)
    processor = loading.load_processor(config if base is None else type(config)(**{**vars(config), "path": base}))
    anatomy = student.anatomy
    eye = loading.eye(processor, anatomy.image_size)
    encoder = PromptEncoder(
        processor,
        image_token_id=anatomy.image_token_id,
        tokens_per_image=anatomy.grid.size,
        max_length=DataConfig().max_length + (most_images - 1) * anatomy.grid.size,
        most_images=most_images,
    )
    view = TowerView(eye.size, eye.mean, eye.std)
    collator = Collator(encoder, view, None, anatomy.grid, padding_side="left", with_answer=False)
    return student, processor.tokenizer, collator


def _require_picture(path: Path) -> None:
    """Raise ConfigError where no picture can be written, before a model is loaded for it."""
    if path.suffix.lower() not in (".png", ".jpg", ".jpeg"):
        raise ConfigError(f"--overlay {path}: name a .png or .jpg file")
    if not path.absolute().parent.is_dir():
        raise ConfigError(f"--overlay {path}: the folder {path.absolute().parent} does not exist")


def _write(folder: Path, rows: Sequence[Prediction], facts: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_predictions(folder / "predictions.jsonl", rows)
    partial = folder / ".scores.json"
    partial.write_text(json.dumps(score(rows) | facts, indent=2) + "\n")
    partial.replace(folder / "scores.json")
