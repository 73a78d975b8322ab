"""Train the phantoms' teacher: a small CLIP, contrastively, on phantom films and their reports.

    python tools/train_phantom_teacher.py                   # train, save, evaluate
    python tools/train_phantom_teacher.py --evaluate-only   # the saved weights alone

The films are those of the "pretrain" stream, which no train, val or test split shares.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import sys
import time
from pathlib import Path

import torch
from open_clip import ClipLoss
from phantom_teacher_evaluation import evaluate
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from tqdm import tqdm

from medalign.data.phantom import stream, study
from medalign.geometry import square_canvas, view
from medalign.teacher.clip import CONFIG_NAME, WEIGHTS_NAME, build_clip

ROOT = Path(__file__).resolve().parents[1]
IMAGE_SIZE, CONTEXT = 96, 48
MEAN, STD = (0.4, 0.4, 0.4), (0.25, 0.25, 0.25)
PAD, UNKNOWN, START, END = "[PAD]", "[UNK]", "[START]", "[END]"


def model_config(vocabulary: int) -> dict:
    vision = {"image_size": IMAGE_SIZE, "patch_size": 8, "width": 96, "head_width": 24, "layers": 4, "mlp_ratio": 3.0}
    text = {"context_length": CONTEXT, "vocab_size": vocabulary, "width": 64, "heads": 4, "layers": 2}
    return {"embed_dim": 64, "vision_cfg": vision, "text_cfg": text, "conv_stem": [16, 32, 64]}


def render(count: int, seed: int) -> tuple[torch.Tensor, list[str]]:
    """Films as the trainer shows them, uint8 [count, IMAGE_SIZE, IMAGE_SIZE], and their reports."""
    films = torch.empty(count, IMAGE_SIZE, IMAGE_SIZE, dtype=torch.uint8)
    reports = []
    for index in tqdm(range(count), desc="films", mininterval=5):
        item = study(stream(seed, "pretrain"), index)
        pixels = view(square_canvas(item.image), IMAGE_SIZE, (0, 0, 0), (1, 1, 1))
        films[index] = (pixels[0] * 255).round().to(torch.uint8)
        reports.append(item.report)
    return films, reports


def make_tokenizer(reports: list[str]) -> Tokenizer:
    """Whole words. The end token has the highest number: open_clip's text tower pools where it finds the maximum."""
    splitter, lower = pre_tokenizers.Whitespace(), normalizers.Lowercase()
    words = {word for text in reports for word, _ in splitter.pre_tokenize_str(lower.normalize_str(text))}
    vocabulary = [PAD, UNKNOWN, START, *sorted(words), END]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token=UNKNOWN))
    tokenizer.normalizer, tokenizer.pre_tokenizer = lower, splitter
    return tokenizer


def tokenize(tokenizer: Tokenizer, texts: list[str]) -> torch.Tensor:
    """[len(texts), CONTEXT] int64, start and end tokens included, padded on the right."""
    vocabulary = tokenizer.get_vocab()
    start, end = vocabulary[START], vocabulary[END]
    ids = torch.full((len(texts), CONTEXT), vocabulary[PAD])
    for row, encoding in zip(ids, tokenizer.encode_batch(texts), strict=True):
        words = [start, *encoding.ids[: CONTEXT - 2], end]
        row[: len(words)] = torch.tensor(words)
    return ids


def normalise(films: torch.Tensor) -> torch.Tensor:
    """uint8 [I, T, T] to what the tower wants, [I, 3, T, T]."""
    return ((films[:, None].float() / 255 - MEAN[0]) / STD[0]).expand(-1, 3, -1, -1)


def train(options: argparse.Namespace) -> tuple[torch.nn.Module, Tokenizer]:
    torch.manual_seed(options.seed)
    films, reports = render(options.studies, options.seed)
    tokenizer = make_tokenizer(reports)
    texts = tokenize(tokenizer, reports)
    model, criterion = build_clip(model_config(tokenizer.get_vocab_size())), ClipLoss()
    flat = [p for p in model.parameters() if p.ndim < 2]
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": flat, "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, lr=options.rate, betas=(0.9, 0.98))
    warmup = min(50, options.steps // 5)

    def schedule(step: int) -> float:
        return min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * step / options.steps)) + 0.01)

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimiser, schedule)
    generator = torch.Generator().manual_seed(options.seed)
    order = torch.empty(0, dtype=torch.long)
    bar = tqdm(range(options.steps), desc="contrastive", mininterval=5)
    for _ in bar:
        if len(order) < options.batch:
            order = torch.randperm(len(films), generator=generator)
        chosen, order = order[: options.batch], order[options.batch :]
        features = model(normalise(films[chosen]), texts[chosen])
        loss = criterion(*features[:3])
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        scheduler.step()
        model.logit_scale.data.clamp_(max=math.log(50))
        bar.set_postfix(loss=f"{loss.item():.3f}", chance=f"{math.log(options.batch):.2f}", refresh=False)
    return model.eval(), tokenizer


def save(model: torch.nn.Module, tokenizer: Tokenizer, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, folder / WEIGHTS_NAME)
    preprocess = {"size": IMAGE_SIZE, "mean": MEAN, "std": STD, "mode": "RGB", "interpolation": "bicubic"}
    config = {"model_cfg": model_config(tokenizer.get_vocab_size()), "preprocess_cfg": preprocess}
    (folder / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n")
    tokenizer.save(str(folder / "tokenizer.json"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=700)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rate", type=float, default=1e-3, help="peak learning rate")
    parser.add_argument("--studies", type=int, default=16000, help="films in the pool that training draws from")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=ROOT / "medalign/assets/phantom_teacher")
    parser.add_argument("--results", type=Path, default=ROOT / "tools/results/phantom_teacher.json")
    parser.add_argument("--held-out", type=int, default=1000, help="films of the test stream to evaluate on")
    parser.add_argument("--evaluate-only", action="store_true")
    options = parser.parse_args()
    started = time.monotonic()
    if not options.evaluate_only:
        save(*train(options), options.output)
    tokenizer = Tokenizer.from_file(str(options.output / "tokenizer.json"))
    results = evaluate(options.output, lambda texts: tokenize(tokenizer, texts), options.held_out, options.seed)
    command = shlex.join(["python", "tools/train_phantom_teacher.py", *sys.argv[1:]])
    results = {"command": command, "seconds": round(time.monotonic() - started), **results}
    options.results.parent.mkdir(parents=True, exist_ok=True)
    options.results.write_text(json.dumps(results, indent=2) + "\n")
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
