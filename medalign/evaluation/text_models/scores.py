"""Scores of reports by models, through the packages of their authors.

| name | package | scores | folder |
| --- | --- | --- | --- |
| bertscore | bert-score | bertscore_precision, bertscore_recall, bertscore_f1 | a text model of transformers |
| chexbert | f1chexbert | chexbert_accuracy_5, chexbert_micro_f1_14, and macro, and of 5 | chexbert/chexbert.pth, bert-base-uncased/ |
| radgraph | radgraph | radgraph_simple, radgraph_partial, radgraph_complete | radgraph-xl/ (unpacked) and its tokenizer |
| ratescore | RaTEScore | ratescore | RaTE-NER-Deberta/, BioLORD-2023-C/ |
| green | green-score | not available | |

Each package runs in its own process, without access to the network, in the model's folder: names of models that a
package does not let one choose are found there. The interpreter may be that of another environment, since some of the
packages need older versions of transformers. Weights are read without unpickling objects. green-score is refused: it
runs code that comes with its model.

Fractions are in [0, 1]. A prediction without text scores 0. A score that cannot be computed is missing and has a
reason; it is never 0 for that.
"""  # noqa: E501, a table cannot be wrapped

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medalign.errors import ConfigError
from medalign.evaluation.metrics.intervals import mean

_WORKER = Path(__file__).with_name("worker.py")
_WEIGHTS = (".safetensors", ".bin", ".pth", ".th", ".pt")
# Exceptions whose text is about files and versions. That of others may contain a report.
_QUOTED = ("ImportError", "ModuleNotFoundError", "AttributeError", "OSError", "FileNotFoundError", "TypeError")
_ERROR = re.compile(r"(?:\w+\.)*(\w+)(?::|$)")
_REFUSED = {"green": "green-score runs code that comes with its model (trust_remote_code), which is not done here"}
NAMES = ("bertscore", "chexbert", "radgraph", "ratescore", "green")


@dataclass(frozen=True)
class TextModel:
    """A score and its model.

    Attributes:
        name: one of NAMES.
        folder: the model's files, in the layout of the table above.
        layers: for bertscore, the layer whose vectors are compared; None for the one that the package has for a model
            of this folder's name.

    Raises:
        ConfigError: the name is unknown, or the folder does not exist.
    """

    name: str
    folder: Path
    layers: int | None = None

    def __post_init__(self) -> None:
        if self.name not in NAMES:
            raise ConfigError(f"--models {self.name}: there is no such score; choose among {', '.join(NAMES)}")
        if not self.folder.is_dir():
            raise ConfigError(f"--models {self.name}={self.folder}: the folder does not exist; name the model's folder")
        if self.layers is not None and self.name != "bertscore":
            raise ConfigError(f"--models {self.name}: only bertscore has a layer; leave out :{self.layers}")

    @classmethod
    def parse(cls, text: str) -> TextModel:
        """Parse NAME=FOLDER or NAME=FOLDER:LAYER. Raises ConfigError."""
        name, _, place = text.partition("=")
        if not place:
            raise ConfigError(f"--models {text}: write NAME=FOLDER, with one of the names {', '.join(NAMES)}")
        layered = re.fullmatch(r"(.+):(\d+)", place)
        return cls(name, Path(layered[1]), int(layered[2])) if layered else cls(name, Path(place))


def model_scores(
    models: Sequence[TextModel], predictions: Sequence[str], references: Sequence[str], python: str = sys.executable
) -> dict[str, Any]:
    """Compute the scores of the table above.

    Args:
        models: which ones.
        predictions: reports, at least one.
        references: one reference per prediction.
        python: the interpreter of the environment with the packages.

    Returns:
        The scores with their signatures, those of means over reports with an interval; under `not_available`, the
        reason for each name that has none.
    """
    scores: dict[str, Any] = {}
    missing = {}
    for model in models:
        found = _run(model, predictions, references, python)
        if "unavailable" in found:
            missing[model.name] = found["unavailable"]
            continue
        if not _is_finite(found):
            missing[model.name] = "its package returned a score that is not a finite number"
            continue
        for name, values in found["of_each"].items():
            scores |= mean(name, values)
        scores |= found["of_all"]
        scores[f"{model.name}_signature"] = f"{found['signature']}|weights:{_digest(model.folder)}"
    return scores | ({"not_available": missing} if missing else {})


def _run(model: TextModel, predictions: Sequence[str], references: Sequence[str], python: str) -> dict[str, Any]:
    """Return what the worker found, or under `unavailable` why it found nothing."""
    if model.name in _REFUSED:
        return {"unavailable": _REFUSED[model.name]}
    job: dict[str, Any] = {"name": model.name, "model": model.folder.absolute().name, "layers": model.layers}
    job |= {"predictions": predictions, "references": references}
    try:
        ended = subprocess.run(
            [python, str(_WORKER)],
            input=json.dumps(job).encode(),
            capture_output=True,
            cwd=model.folder,
            env=_environment(model.folder.resolve()),
            check=False,
        )
    except OSError as error:
        raise ConfigError(f"--models-python {python} cannot be run ({error.strerror}); name an interpreter") from error
    if ended.returncode:
        return {"unavailable": f"its package failed with {_last_error(ended.stderr, model.folder)}"}
    try:
        found: dict[str, Any] = json.loads(ended.stdout)
    except ValueError:
        return {
            "unavailable": f"its process wrote no result; check that --models-python {python} is a Python interpreter"
        }
    return found


def _is_finite(found: Mapping[str, Any]) -> bool:
    of_each = (value for values in found["of_each"].values() for value in values)
    return all(map(math.isfinite, (*of_each, *found["of_all"].values())))


def _environment(folder: Path) -> Mapping[str, str]:
    """Return the environment of a worker: no network, no unpickling, and the folder as the packages' cache."""
    return os.environ | {
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "TORCH_FORCE_WEIGHTS_ONLY_LOAD": "1",
        "PYTHONSAFEPATH": "1",
        "XDG_CACHE_HOME": str(folder),
    }


def _last_error(output: bytes, folder: Path) -> str:
    """Return the exception that ended a worker; its text only if it cannot contain a report."""
    lines = output.decode(errors="replace").strip().splitlines()
    kind = _ERROR.match(lines[-1]) if lines else None
    if kind is None:
        return "no message"
    quoted = lines[-1].replace(str(folder.resolve()), folder.name)[:300]
    return quoted if kind[1] in _QUOTED else kind[1]


def _digest(folder: Path) -> str:
    """Return 64 bits of the SHA-256 of the weights in a folder, in hexadecimal."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.suffix in _WEIGHTS):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]
