"""Train the phantoms' teacher: a small CLIP, contrastively, on phantom films and their reports.

    python -m tools.phantom_models.train_teacher                   # train, save, evaluate
    python -m tools.phantom_models.train_teacher --evaluate-only   # the saved weights only

The films come from the "pretrain" stream, which shares no study with the train, val and test splits. Two linear heads
add losses to the contrastive one and are discarded afterwards. One predicts every finding and its location from the
image embedding. The other predicts what each patch shows, supervised by the masks. With reports only, a model of this
size learns only the largest findings (effusion, heart size), which distinguish most films of a batch: after 700 steps
it still missed the others.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from open_clip import ClipLoss
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

from medalign.geometry import CanvasFrame, PatchGrid, PreprocessCfg, square_canvas
from medalign.phantom import KINDS, Finding, stream, study
from medalign.phantom.contracts import SIDES, ZONES
from medalign.teacher.source import CONFIG_NAME, WEIGHTS_NAME
from medalign.teacher.towers.open_clip_vit import build_clip
from tools.phantom_models.teacher_evaluation import evaluate

ROOT = Path(__file__).resolve().parents[2]
IMAGE_SIZE, CONTEXT, EMBEDDING = 96, 48, 64
PATCH, WIDTH = 8, 96
GRID = PatchGrid(IMAGE_SIZE // PATCH, IMAGE_SIZE // PATCH)
NAMING_WEIGHT, MAPPING_WEIGHT = 0.5, 2.0  # of the heads' losses (sums over sites and kinds); the contrastive one has 1
SHOWN = 0.3  # a patch shows a finding that covers more than this share of it
RARITY = 4.0  # weight of patches that show a finding against those that do not
MEAN, STD = (0.4, 0.4, 0.4), (0.25, 0.25, 0.25)
LUNG_SITES = [(kind, side, zone) for kind in ("nodule", "consolidation") for side in SIDES for zone in ZONES]
SIDE_SITES = [(kind, side, zone) for kind, zone in (("effusion", "lower"), ("pneumothorax", "upper")) for side in SIDES]
SITES = [("cardiomegaly", "", ""), *SIDE_SITES, *LUNG_SITES]
PAD, UNKNOWN, START, END = "[PAD]", "[UNK]", "[START]", "[END]"


def model_config(vocabulary: int) -> dict:
    """Return open_clip's configuration of the model."""
    vision = {
        "image_size": IMAGE_SIZE,
        "patch_size": PATCH,
        "width": WIDTH,
        "head_width": 24,
        "layers": 3,
        "mlp_ratio": 2.0,
    }
    text = {"context_length": CONTEXT, "vocab_size": vocabulary, "width": 64, "heads": 4, "layers": 2}
    return {"embed_dim": EMBEDDING, "vision_cfg": vision, "text_cfg": text, "conv_stem": [24, 48, 96]}


@dataclass
class Pool:
    """The films and reports that training draws from."""

    films: torch.Tensor  # uint8 [n, IMAGE_SIZE, IMAGE_SIZE], resized as during distillation
    sites: torch.Tensor  # float32 [n, len(SITES)], 1 where there is a finding
    maps: torch.Tensor  # bool [n, GRID.size, len(KINDS)], True where the patch shows the finding
    reports: list[str]


def shown(finding: Finding) -> torch.Tensor:
    """Return which patches of the canvas show a finding, bool [GRID.size]."""
    height, width = finding.mask.shape
    frame = CanvasFrame(width, height)
    canvas = torch.zeros(frame.side, frame.side)
    canvas[frame.top : frame.top + height, frame.left : frame.left + width] = torch.from_numpy(finding.mask)
    return F.adaptive_avg_pool2d(canvas[None], (GRID.rows, GRID.columns)).flatten() > SHOWN


def render(count: int, seed: int) -> Pool:
    """Render the films of the pool, with their sites, maps and reports."""
    films = torch.empty(count, IMAGE_SIZE, IMAGE_SIZE, dtype=torch.uint8)
    sites = torch.zeros(count, len(SITES))
    maps = torch.zeros(count, GRID.size, len(KINDS), dtype=torch.bool)
    reports = []
    for index in tqdm(range(count), desc="films", mininterval=5):
        item = study(stream(seed, "pretrain"), index)
        pixels = PreprocessCfg(IMAGE_SIZE, (0, 0, 0), (1, 1, 1)).view(square_canvas(item.image))
        films[index] = (pixels[0] * 255).round().to(torch.uint8)
        for found in item.findings:
            sites[index, SITES.index((found.kind, found.side, found.zone))] = 1
            maps[index, :, KINDS.index(found.kind)] |= shown(found)
        reports.append(item.report)
    return Pool(films, sites, maps, reports)


def make_tokenizer(reports: list[str]) -> Tokenizer:
    """Build a tokenizer of whole words.

    The end token has the highest number, because open_clip's text tower pools at the position of the maximum.
    """
    splitter, lower = pre_tokenizers.Whitespace(), normalizers.Lowercase()
    words = {word for text in reports for word, _ in splitter.pre_tokenize_str(lower.normalize_str(text))}
    vocabulary = [PAD, UNKNOWN, START, *sorted(words), END]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token=UNKNOWN))
    tokenizer.normalizer, tokenizer.pre_tokenizer = lower, splitter
    return add_frame(tokenizer)


def add_frame(tokenizer: Tokenizer) -> Tokenizer:
    """Let a tokenizer write the start and the end token, cut to the context, and pad to it."""
    ids = {token: tokenizer.token_to_id(token) for token in (START, END)}
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{START} $A {END}", special_tokens=[(token, ids[token]) for token in (START, END)]
    )
    tokenizer.enable_truncation(CONTEXT)
    tokenizer.enable_padding(length=CONTEXT, pad_id=tokenizer.token_to_id(PAD), pad_token=PAD)
    return tokenizer


def tokenize(tokenizer: Tokenizer, texts: list[str]) -> torch.Tensor:
    """Convert texts to int64 [len(texts), CONTEXT], with start and end tokens, padded on the right."""
    return torch.tensor([encoding.ids for encoding in tokenizer.encode_batch(texts)])


def normalize(films: torch.Tensor) -> torch.Tensor:
    """Convert uint8 [I, T, T] to the tower's input [I, 3, T, T]."""
    return ((films[:, None].float() / 255 - MEAN[0]) / STD[0]).expand(-1, 3, -1, -1)


def make_optimizer(modules: nn.Module, rate: float, steps: int) -> tuple[torch.optim.Optimizer, LambdaLR]:
    """Build AdamW without weight decay on vectors, and a schedule: warm-up, then a cosine down to one hundredth."""
    matrices = [p for p in modules.parameters() if p.ndim >= 2]
    flat = [p for p in modules.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": flat, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98))
    warmup = max(min(50, steps // 5), 1)

    def scale(step: int) -> float:
        return min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * step / steps)) + 0.01)

    return optimizer, LambdaLR(optimizer, scale)


def batches(size: int, batch: int, steps: int, seed: int) -> Iterator[torch.Tensor]:
    """Yield batches of indices of films. Every film is drawn once before any is drawn again."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.long)
    for _ in range(steps):
        if len(order) < batch:
            order = torch.randperm(size, generator=generator)
        yield order[:batch]
        order = order[batch:]


class Heads(nn.Module):
    """Linear heads that supervise the tower with the findings during training; see the module's docstring."""

    def __init__(self) -> None:
        super().__init__()
        self.sample_context = nn.Linear(EMBEDDING, len(SITES))
        self.mapping = nn.Linear(WIDTH, len(KINDS))

    def losses(
        self, image: torch.Tensor, patches: torch.Tensor, sites: torch.Tensor, maps: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the losses of the embeddings [I, EMBEDDING] and of the patch features [I, M, WIDTH].

        The first is summed over the sites, the second over the kinds; both are means over everything else.
        """
        rarity = torch.tensor(RARITY)
        named = F.binary_cross_entropy_with_logits(self.sample_context(image), sites) * len(SITES)
        mapped = F.binary_cross_entropy_with_logits(self.mapping(patches), maps.float(), pos_weight=rarity)
        return named, mapped * len(KINDS)


def train(options: argparse.Namespace) -> None:
    """Train the teacher and save it every 100 steps."""
    torch.manual_seed(options.seed)
    pool = render(options.studies, options.seed)
    tokenizer = make_tokenizer(pool.reports)
    texts = tokenize(tokenizer, pool.reports)
    model, heads, contrast = build_clip(model_config(tokenizer.get_vocab_size())), Heads(), ClipLoss()
    model.visual.output_tokens = True
    optimizer, scheduler = make_optimizer(nn.ModuleList([model, heads]), options.rate, options.steps)
    order = batches(len(pool.films), options.batch, options.steps, options.seed)
    bar = tqdm(order, total=options.steps, desc="training", mininterval=5)
    for step, chosen in enumerate(bar, 1):
        image, patches = model.visual(normalize(pool.films[chosen]))
        text = model.encode_text(texts[chosen], normalize=True)
        pulled = contrast(F.normalize(image, dim=-1), text, model.logit_scale.exp())
        named, mapped = heads.losses(image, patches, pool.sites[chosen], pool.maps[chosen])
        optimizer.zero_grad(set_to_none=True)
        (pulled + NAMING_WEIGHT * named + MAPPING_WEIGHT * mapped).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        model.logit_scale.data.clamp_(max=math.log(50))
        figures = {"contrast": pulled.item(), "naming": named.item(), "mapping": mapped.item()}
        bar.set_postfix({name: f"{value:.3f}" for name, value in figures.items()}, refresh=False)
        if step % 100 == 0 or step == options.steps:
            save(model, tokenizer, options.output)


def save(model: nn.Module, tokenizer: Tokenizer, folder: Path) -> None:
    """Write weights, configuration and tokenizer into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, folder / WEIGHTS_NAME)
    preprocess = {"size": IMAGE_SIZE, "mean": MEAN, "std": STD, "mode": "RGB", "interpolation": "bicubic"}
    config = {"model_cfg": model_config(tokenizer.get_vocab_size()), "preprocess_cfg": preprocess}
    (folder / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n")
    tokenizer.save(str(folder / "tokenizer.json"))


def main() -> None:
    """Train the teacher, evaluate it and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rate", type=float, default=1.5e-3, help="peak learning rate")
    parser.add_argument("--studies", type=int, default=8000, help="films in the pool that training draws from")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=ROOT / "medalign/assets/phantom_teacher")
    parser.add_argument("--results", type=Path, default=ROOT / "tools/benchmarks/results/phantom_teacher.json")
    parser.add_argument("--held-out", type=int, default=1000, help="films of the test stream to evaluate on")
    parser.add_argument("--calibration", type=int, default=1000, help="films of the val stream to set thresholds on")
    parser.add_argument("--evaluate-only", action="store_true", help="evaluate the saved weights, train nothing")
    options = parser.parse_args()
    started = time.monotonic()
    command = shlex.join(["python", "-m", "tools.phantom_models.train_teacher", *sys.argv[1:]])
    if options.evaluate_only:
        training = json.loads(options.results.read_text())["training"] if options.results.is_file() else None
    else:
        train(options)
        training = {"command": command, "seconds": round(time.monotonic() - started)}
    tokenizer = Tokenizer.from_file(str(options.output / "tokenizer.json"))
    counts = options.held_out, options.calibration
    results = evaluate(options.output, lambda texts: tokenize(tokenizer, texts), *counts, options.seed)
    results = {"training": training, "evaluated_by": command, **results}
    options.results.parent.mkdir(parents=True, exist_ok=True)
    options.results.write_text(json.dumps(results, indent=2) + "\n")
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
