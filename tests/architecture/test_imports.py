"""The package's structure: imports descend, each library has one door, nothing prints, nothing unpickles.

The checks parse the sources and do not import them.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from fnmatch import fnmatch
from pathlib import Path

import pytest

PACKAGE = "medalign"
ROOT = Path(__file__).parents[2] / PACKAGE

# A room is a folder or a single file directly under medalign/. Files on one floor may import each other (without
# cycles), folders may not. A new room is given its floor here.
FLOORS = (
    (
        "__init__",
        "errors",
        "geometry",
        "contracts",
        "distributed",
        "exit_records",
        "file_lock",
        "import_path",
        "run_folder",
        "stop_signals",
        "work_queue",
    ),
    ("config",),
    ("kernels", "data", "observability"),
    ("losses", "teacher", "student", "datasets", "phantom"),
    ("engine", "decoding"),
    ("checkpoint", "evaluation", "benchmark", "planning"),
    ("training",),
    (
        "assembly",
        "run",
        "pipeline",
        "inference",
        "answering",
        "questions",
        "model_card",
        "evaluator",
        "probing",
        "grounding",
        "separability",
        "inspection",
        "target_cache",
        "teacher_maps",
        "doctor",
        "supervising",
        "watching",
    ),
    ("cli", "__main__"),
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}

# library: the files that may import it, as patterns under medalign/
DOORS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("bert_score", "f1chexbert", "radgraph", "RaTEScore"), ("evaluation/text_models/worker.py",)),
    "deepspeed": ("engine/*",),
    "fsspec": ("data/storage/filesystems.py",),
    "huggingface_hub": ("model_card.py", "student/reading.py", "teacher/towers/hf.py"),
    "open_clip": ("teacher/source.py", "teacher/towers/open_clip*.py", "teacher/towers/timm*.py"),
    "peft": ("student/loading.py",),
    "pydicom": ("data/samples/dicom*.py",),
    "rich": ("watching.py", "cli/watch.py"),
    "sklearn": ("decoding/caption_heads.py", "evaluation/separability.py"),
    "timm": ("teacher/towers/timm*.py",),
    "transformers": ("student/*", "engine/engine.py", "teacher/towers/hf*.py"),
    "triton": ("*kernels/*triton*.py",),
    "wandb": ("observability/wandb_*.py",),
    "wandb_workspaces": ("observability/wandb_dashboard.py",),
    "webdataset": ("data/shards/writer.py",),
}

PICKLERS = ("pickle", "cPickle", "dill", "joblib", "cloudpickle", "shelve")
HARMLESS = "pickle.UnpicklingError"  # what torch.load(weights_only=True) raises

# Names of files and folders in a run's folder, which only run_folder.py may contain. Those in RUN_FOLDERS are common
# words, and count only if they are joined to a path.
LAYOUT_OWNER = "run_folder.py"
RUN_FILES = {
    "config.yaml",
    "environment.json",
    "metrics.jsonl",
    "attempts.jsonl",
    "wandb_run_id",
    "progress.json",
    "complete.json",
    "predictions.jsonl",
    "scores.json",
    "grounding.json",
    "grounding.jsonl",
    "separability.json",
}
RUN_FOLDERS = {"checkpoints", "latest", "export", "evaluation", "lock", "state", "wandb"}

Sources = Mapping[str, str]  # path under medalign/ -> text


def sources() -> dict[str, str]:
    return {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in sorted(ROOT.rglob("*.py"))}


def module_name(path: str) -> str:
    parts = Path(path).with_suffix("").parts
    return ".".join((PACKAGE, *(parts[:-1] if parts[-1] == "__init__" else parts)))


def room(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def imports(path: str, tree: ast.Module) -> Iterator[tuple[str, int]]:
    """Yield every imported name with its line, including imports inside functions. Relative names become absolute."""
    package = (PACKAGE, *Path(path).parts[:-1])
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            stem = ".".join((*base, *([node.module] if node.module else [])))
            yield from ((f"{stem}.{alias.name}", node.lineno) for alias in node.names)


def internal_imports(texts: Sources) -> dict[str, dict[str, int]]:
    """Return, for each module, the modules of the package that it imports, with the line."""
    modules = {module_name(path) for path in texts}
    graph: dict[str, dict[str, int]] = {module_name(path): {} for path in texts}
    for path, text in texts.items():
        for name, line in imports(path, ast.parse(text)):
            if name.split(".")[0] != PACKAGE:
                continue
            # `from medalign.a import b` imports the module a.b, or an object in the module a.
            target = name
            while target not in modules and "." in target:
                target = target.rpartition(".")[0]
            if target != module_name(path):
                graph[module_name(path)].setdefault(target, line)
    return graph


def floor_breaches(texts: Sources) -> list[str]:
    breaches = [
        f"{name}: give the room {room(name)!r} a floor" for name in map(module_name, texts) if room(name) not in FLOOR
    ]
    folders = {Path(path).parts[0] for path in texts if len(Path(path).parts) > 1}
    for module, targets in internal_imports(texts).items():
        for target, line in targets.items():
            here, there = room(module), room(target)
            if here == there or here not in FLOOR or there not in FLOOR or there == "__init__":
                continue
            up = FLOOR[there] > FLOOR[here]
            neighbors = FLOOR[there] == FLOOR[here] and here in folders and there in folders
            if up or neighbors:
                breaches.append(f"{module}:{line} imports {target}, {'above it' if up else 'its neighbor'}")
    return breaches


def cycles(texts: Sources) -> list[str]:
    graph, done, found = internal_imports(texts), set(), []

    def visit(module: str, trail: tuple[str, ...]) -> None:
        if module in trail:
            found.append(" -> ".join((*trail[trail.index(module) :], module)))
        elif module not in done:
            for target in graph.get(module, {}):
                visit(target, (*trail, module))
            done.add(module)

    for module in graph:
        visit(module, ())
    return found


def door_breaches(texts: Sources) -> list[str]:
    return [
        f"{path}:{line} imports {name}; only {', '.join(DOORS[vendor])} may"
        for path, text in texts.items()
        for name, line in imports(path, ast.parse(text))
        if (vendor := name.split(".")[0]) in DOORS and not any(fnmatch(path, door) for door in DOORS[vendor])
    ]


def dangers(texts: Sources) -> list[str]:
    """Return calls that print, unpickle, or run code from a model's folder."""
    found = []
    for path, text in texts.items():
        tree = ast.parse(text)
        for name, line in imports(path, tree):
            if name.split(".")[0] in PICKLERS and name not in ("pickle", HARMLESS):
                found.append(f"{path}:{line} imports {name}")
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                found += [f"{path}:{node.lineno} {what}" for what in call_dangers(node)]
            elif isinstance(node, ast.Attribute) and ast.unparse(node.value) == "pickle":
                found += [f"{path}:{node.lineno} uses pickle.{node.attr}"] * (ast.unparse(node) != HARMLESS)
            elif isinstance(node, ast.Dict):
                pairs = zip(node.keys, node.values, strict=True)
                if any(is_constant(k, "trust_remote_code") and is_constant(v, True) for k, v in pairs):
                    found.append(f"{path}:{node.lineno} trusts remote code")
    return found


def layout_breaches(texts: Sources) -> list[str]:
    """Return names in a run's folder that occur outside the file that defines its layout."""
    return [
        f"{path}:{line} spells {name!r} of a run's folder; take it from {LAYOUT_OWNER}"
        for path, text in texts.items()
        if path != LAYOUT_OWNER
        for node in ast.walk(ast.parse(text))
        for name, line in layout_names(node)
    ]


def layout_names(node: ast.AST) -> Iterator[tuple[str, int]]:
    if isinstance(node, ast.Constant) and node.value in RUN_FILES:
        yield str(node.value), node.lineno
    elif isinstance(node, ast.JoinedStr):
        parts = [str(part.value) for part in node.values if isinstance(part, ast.Constant)]
        yield from ((part, node.lineno) for part in parts if part.startswith("step-"))
    elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div):
        joined = str(node.right.value) if isinstance(node.right, ast.Constant) else ""
        if joined.split("/")[0] in RUN_FOLDERS:
            yield joined, node.lineno


def call_dangers(call: ast.Call) -> list[str]:
    name = ast.unparse(call.func)
    options = {keyword.arg: keyword.value for keyword in call.keywords}
    found = []
    if name == "print":
        found.append("prints")
    if name == "torch.load" and not is_constant(options.get("weights_only"), True):
        found.append("calls torch.load without weights_only=True")
    if is_constant(options.get("allow_pickle"), True):
        found.append("allows pickle")
    if is_constant(options.get("trust_remote_code"), True):
        found.append("trusts remote code")
    return found


def is_constant(node: ast.expr | None, value: object) -> bool:
    return (
        isinstance(node, ast.Constant)
        and node.value is value
        or (isinstance(node, ast.Constant) and isinstance(value, str) and node.value == value)
    )


@pytest.mark.parametrize("check", [floor_breaches, cycles, door_breaches, dangers, layout_breaches])
def test_the_package_keeps_its_structure(check):
    assert check(sources()) == []


BREACHES = [
    (floor_breaches, {"data/loader.py": "from medalign.training.step import step", "training/step.py": ""}, "above it"),
    (floor_breaches, {"data/loader.py": "def f():\n    from ..run import go", "run.py": "go = 1"}, "above it"),
    (floor_breaches, {"losses/a.py": "import medalign.student.capture", "student/capture.py": ""}, "its neighbor"),
    (floor_breaches, {"losses/a.py": "from medalign import student", "student/__init__.py": ""}, "its neighbor"),
    (floor_breaches, {"attic/a.py": ""}, "give the room 'attic' a floor"),
    (cycles, {"geometry.py": "from medalign import errors", "errors.py": "from .geometry import x"}, "->"),
    (
        cycles,
        {"data/a.py": "from .b import x", "data/b.py": "from .c import x", "data/c.py": "from . import a"},
        "data.b",
    ),
    (door_breaches, {"training/loop.py": "import deepspeed.comm as c"}, "engine/*"),
    (door_breaches, {"observability/meters.py": "def f():\n    import wandb"}, "wandb_"),
    (door_breaches, {"checkpoint/export.py": "from peft import LoraConfig"}, "loading.py"),
    (door_breaches, {"kernels/dispatch.py": "from triton import language"}, "*triton*.py"),
    (door_breaches, {"teacher/model.py": "import timm"}, "teacher/towers/timm*.py"),
    (door_breaches, {"losses/attention.py": "from transformers import CLIPModel"}, "student/*, engine/engine.py"),
    (dangers, {"run.py": "print('x')"}, "prints"),
    (dangers, {"run.py": "import pickle\npickle.load(f)"}, "uses pickle.load"),
    (dangers, {"run.py": "from pickle import loads"}, "imports pickle.loads"),
    (dangers, {"run.py": "import dill"}, "imports dill"),
    (dangers, {"run.py": "import torch\ntorch.load(f)"}, "weights_only"),
    (dangers, {"run.py": "import torch\ntorch.load(f, weights_only=False)"}, "weights_only"),
    (dangers, {"run.py": "np.load(f, allow_pickle=True)"}, "allows pickle"),
    (dangers, {"run.py": "build(trust_remote_code=True)"}, "trusts remote code"),
    (dangers, {"run.py": "build(**{'trust_remote_code': True})"}, "trusts remote code"),
    (layout_breaches, {"run.py": "folder / 'metrics.jsonl'"}, "spells 'metrics.jsonl'"),
    (layout_breaches, {"run.py": "NAME = 'scores.json'"}, "spells 'scores.json'"),
    (layout_breaches, {"run.py": "folder / 'checkpoints' / name"}, "spells 'checkpoints'"),
    (layout_breaches, {"run.py": "folder / 'evaluation/val'"}, "spells 'evaluation/val'"),
    (layout_breaches, {"run.py": "f'step-{step:06d}'"}, "spells 'step-'"),
]


@pytest.mark.parametrize(("check", "texts", "message"), BREACHES)
def test_the_checks_see_a_breach(check, texts, message):
    assert any(message in breach for breach in check(texts)), check(texts)


def test_the_checks_let_good_sources_pass():
    texts = {
        "__init__.py": "",
        "errors.py": "",
        "geometry.py": "from medalign.errors import ConfigError",
        "data/shards/writer.py": "import webdataset\nfrom medalign import geometry\nfrom ..samples import decode",
        "data/samples/sample.py": "import torch\nx = torch.load(f, weights_only=True)",
        "kernels/attention_map/triton.py": "import triton.language as tl",
        "engine/zero/build.py": "import deepspeed",
        "run.py": "from medalign.data import shards\nfrom medalign.engine.zero.build import x\nlogger.print('x')",
        "__main__.py": "from medalign.run import main",
        "run_folder.py": "path / 'checkpoints' / f'step-{step:06d}'",
        "cli/export.py": "add('export', 'writes RUN/evaluation/NAME/scores.json')",
        "teacher/weights.py": "import pickle\ntry:\n    x = 1\nexcept pickle.UnpicklingError:\n    pass",
        "engine/zero/__init__.py": "",
    }
    checks = (floor_breaches, cycles, door_breaches, dangers, layout_breaches)
    assert [check(texts) for check in checks] == [[], [], [], [], []]
