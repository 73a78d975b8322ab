"""The model card of an export: README.md with front matter that the Hugging Face hub accepts.

It states only what the files of the run say, and what is missing. It has only the last name of folders, and no text,
image or key of a sample.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from medalign import config as configuration
from medalign.checkpoint import export
from medalign.checkpoint.state import TrainState, read_state
from medalign.config import Config, StudentConfig
from medalign.config.keys import flatten
from medalign.data.shards.index import ShardIndex
from medalign.errors import MedAlignError
from medalign.evaluation.provenance import describe_weights, versions
from medalign.evaluation.scores_file import read_scores
from medalign.observability.files import write_text
from medalign.run_folder import CheckpointFolder, find_run

CARD = "README.md"
_METRICS = {  # score -> its name, and the group that it counts
    "closed_accuracy": ("closed questions, accuracy", "closed_n"),
    "open_exact": ("open questions, exact answers", "open_n"),
    "open_recall": ("open questions, recall of words", "open_n"),
    "bleu": ("reports, BLEU (0 to 100)", "report_n"),
    "rouge_l": ("reports, ROUGE-L", "report_n"),
    "attention_inside": ("attention inside boxes", "grounding_n"),
    "pointing_hits": ("pointing game", "pointing_n"),
}
_SECTIONS = ("teacher.", "student.", "losses.", "train.", "optimizer.", "data.max_length", "run.seed")


@dataclass(frozen=True)
class CardFacts:
    """What is known about an export."""

    student: StudentConfig
    merged: bool
    config: Config | None = None  # settings of the training; None if the export is not in a checkpoint
    state: TrainState | None = None
    samples: Sequence[tuple[str, int | None]] = ()  # of each training folder by its last name; None if it moved
    scores: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # evaluation -> its scores
    license: Mapping[str, str] = field(default_factory=dict)  # fields of the base model's own card


def write_card(source: Path, output: Path, merged: bool, base: str | None = None) -> None:
    """Write the model card of an export, unless it was copied with one.

    Args:
        source: the export, in a checkpoint or on its own.
        output: the folder of the new export.
        merged: whether it is a folder of transformers.
        base: folder of the base model, if it has moved since the training.
    """
    if not (output / CARD).exists():
        write_text(output / CARD, str(build_card(collect_facts(source, merged, base))))


def collect_facts(source: Path, merged: bool, base: str | None = None) -> CardFacts:
    """Read what the files around an export say about it; the arguments are those of `write_card`."""
    student = export.settings(source)
    license_fields = _license(Path(base or student.path))
    checkpoint = CheckpointFolder(source.resolve().parent)
    if not checkpoint.config.is_file():
        return CardFacts(student, merged, license=license_fields)
    config = configuration.read(checkpoint.config)
    samples = [(_last(folder), _samples(folder)) for folder in config.data.folders]
    scores = dict(_scores(source))
    return CardFacts(student, merged, config, read_state(checkpoint.path), samples, scores, license_fields)


def build_card(facts: CardFacts) -> ModelCard:
    """Build the card."""
    license_fields: dict[str, Any] = dict(facts.license)
    data = ModelCardData(
        library_name="transformers" if facts.merged else "peft" if facts.student.train == "lora" else "medalign",
        pipeline_tag="image-text-to-text",
        tags=["medical", "medalign", "vision-language-model"],
        model_name=f"medalign {_last(facts.student.path)}" if facts.scores else None,
        eval_results=list(_eval_results(facts.scores)) or None,
        **license_fields,
    )
    parts = [
        f"# {_last(facts.student.path)}, trained with medalign",
        _purpose(facts),
        "## Models",
        _models(facts),
        "## Data",
        _data(facts),
        "## Scores",
        _scores_table(facts.scores),
        "## Limits",
        _LIMITS,
        "## Settings",
        _settings(facts),
        "## Versions",
        _table(("Library", "Version"), versions().items()),
    ]
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n")


_LIMITS = """\
- Not a medical device. It was not tested for clinical use; its answers must not decide about a patient.
- It was trained and scored on the data above only. Scores on other data, devices or populations are not known.
- The attention of a question is a saliency map. It does not show what an answer depends on.
- Weights that were trained on private data can reveal it. Share them as the data may be shared."""


def _purpose(facts: CardFacts) -> str:
    if facts.merged:
        return "A vision-language model whose adapter is merged into its weights. Load it with transformers."
    trained = ", ".join(_trained(facts.student))
    return (
        f"What was trained of a vision-language model: {trained}. It needs the base model. `medalign generate` loads "
        "all of it; peft loads only adapters, which gives other answers than the whole."
    )


def _trained(student: StudentConfig) -> Iterator[str]:
    yield "LoRA adapters" if student.train == "lora" else "all weights of the language model"
    if student.steering:
        yield f"W on the image tokens at the input of block {student.layer}"
    if student.query_mixture:
        yield f"the query mixture of block {student.layer}"
    if student.train_projector:
        yield "the projector"
    if student.train_vision_tower:
        yield "the vision tower"


def _models(facts: CardFacts) -> str:
    license_name = facts.license.get("license_name") or facts.license.get("license")
    rows = [("base model (folder)", _last(facts.student.path))]
    rows.append(("license that its card states", license_name or "none found: read the base model's terms"))
    if facts.config is not None:
        rows.append(("teacher", _last(facts.config.teacher.path) if facts.config.distils else "none"))
    return _table(("", ""), rows)


def _data(facts: CardFacts) -> str:
    if facts.state is None:
        return "Not recorded: this was exported from an export, not from a run."
    rows = [
        (name, "not known: the folder has moved" if count is None else f"{count:,}") for name, count in facts.samples
    ]
    drawn = f"{facts.state.samples:,} samples were drawn in {facts.state.step:,} steps."
    return f"{_table(('Folder of shards', 'Samples'), rows)}\n\n{drawn}"


def _scores_table(scores: Mapping[str, Mapping[str, Any]]) -> str:
    rows = []
    for name, found in scores.items():
        for metric, (title, count) in _METRICS.items():
            if metric not in found:
                continue
            low, high = found.get(f"{metric}_low"), found.get(f"{metric}_high")
            interval = "" if low is None or high is None else f"{low:.3f} to {high:.3f}"
            rows.append((name, title, f"{found[metric]:.3f}", interval, f"{found[count]:,}"))
    if not rows:
        return "None: these weights were not evaluated (`medalign evaluate`)."
    note = "Intervals are 95 % bootstrap intervals over samples. Beside each other they are no test of a difference."
    return f"{_table(('Evaluation', 'Score', 'Value', 'Interval', 'n'), rows)}\n\n{note}"


def _settings(facts: CardFacts) -> str:
    if facts.config is None:
        return "Not recorded: this was exported from an export, not from a run."
    values = flatten(asdict(facts.config))
    kept = {name: value for name, value in values.items() if name.startswith(_SECTIONS)}
    return _table(("Setting", "Value"), ((name, _plain(value)) for name, value in sorted(kept.items())))


def _eval_results(scores: Mapping[str, Mapping[str, Any]]) -> Iterator[EvalResult]:
    for name, found in scores.items():
        for metric, (title, _) in _METRICS.items():
            if metric in found:
                yield EvalResult(
                    "image-text-to-text", "custom", name, metric, round(found[metric], 4), metric_name=title
                )


def _scores(source: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the evaluations of exactly these weights."""
    weights = describe_weights(source)["weights"]
    for evaluation in find_run(source)[0].evaluations():
        found = read_scores(evaluation.scores)
        if found.get("provenance", {}).get("weights") == weights:
            yield evaluation.path.name, found


def _samples(folder: str) -> int | None:
    try:
        return len(ShardIndex.open(folder))
    except (MedAlignError, OSError):
        return None


def _license(base: Path) -> dict[str, str]:
    """Return the fields about the license in the base model's own card."""
    if not (base / CARD).is_file():
        return {}
    found = ModelCard.load(base / CARD, ignore_metadata_errors=True).data.to_dict()
    names = ("license", "license_name", "license_link")
    return {name: found[name] for name in names if isinstance(found.get(name), str)}


def _plain(value: Any) -> str:
    """Return a setting as text, with only the last name of a path."""
    if isinstance(value, list | tuple):
        return ", ".join(map(_plain, value))
    if isinstance(value, dict):  # a further teacher
        return " ".join(f"{name}={_plain(one)}" for name, one in value.items())
    return _last(value) if isinstance(value, str) and "/" in value else str(value)


def _last(place: str) -> str:
    return PurePosixPath(urlsplit(place).path).name or place.strip("/")


def _table(head: tuple[str, ...], rows: Any) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)
