"""Makes a LLaVA whose vision tower is a teacher's, for the ablation that uses the teacher's features directly.

    python -m tools.exchange_tower --student LLAVA --teacher SOURCE --output DIR

The student is a LLaVA in transformers' format or in its authors' layout, the teacher one of those that `teacher.path`
takes. The output is a folder in transformers' format with the teacher's tower, image size and normalization, the
student's language model, and a projector with random weights, which must be trained (`student.train_projector true`).

The projector reads the patches after the tower's last block, before its final norm: `vision_feature_layer` -1. This is
what LLaVA can take from all towers, and the features that the paper's released code takes from its teacher.

The whole student is in memory, in the precision of its files.
"""

from __future__ import annotations

import argparse
import copy
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import CLIPImageProcessor, LlavaForConditionalGeneration

from medalign.config import StudentConfig
from medalign.errors import ConfigError, MedAlignError
from medalign.geometry import PreprocessCfg
from medalign.student.checks import check_student
from medalign.student.families.llava import Llava
from medalign.student.families.llava_authors import LlavaAuthors
from medalign.student.loading import model_folder
from medalign.student.weights import family_of, load_model
from medalign.teacher.loading import load_teacher
from medalign.teacher.source import Colors, find_teacher
from tools.teacher_towers import class_tokens, transformers_tower

_TOWER, _PROJECTOR = "model.vision_tower.", "model.multi_modal_projector."


def exchange(
    student: Path, teacher: str, output: Path, mean: Colors | None = None, std: Colors | None = None, seed: int = 0
) -> None:
    """Write the folder.

    Args:
        student: folder of a LLaVA.
        teacher: a teacher, as `teacher.path`.
        output: the new folder.
        mean: the mean that the teacher's pixels are normalized with; None takes its folder's.
        std: the standard deviation, as `mean`.
        seed: seed of the projector's weights.

    Raises:
        ConfigError: the student is not a LLaVA, the teacher's tower cannot be one of LLaVA, or `output` exists.
        CheckpointError: the teacher's weights cannot be read.
    """
    if output.exists():
        raise ConfigError(f"{output} already exists; choose a new folder")
    settings = StudentConfig(path=str(student), layer=1)
    family = family_of(model_folder(settings))
    if type(family) is not Llava and not isinstance(family, LlavaAuthors):
        raise ConfigError(
            f"student.path {student}: a {family.model_type} is not supported; give a LLaVA in transformers' format or "
            "in its authors' layout"
        )
    _, processor = check_student(settings)
    frozen = load_teacher(teacher, mean=mean, std=std, features="before_norm")
    tower = transformers_tower(find_teacher(teacher, mean, std), frozen.tower)
    model = _with_tower(load_model(str(student), settings, dtype="auto"), tower, seed)
    _set_images(processor, frozen.preprocess_cfg, tower)
    model.save_pretrained(output)
    processor.save_pretrained(output)
    check_student(StudentConfig(path=str(output), layer=1))


def _with_tower(student: Any, tower: Any, seed: int) -> Any:
    """Return a LLaVA of the student's language model, the tower, and a new projector, without copying the first."""
    config = copy.deepcopy(student.config)
    config.vision_config = tower.config
    config.vision_config.dtype = student.dtype
    config.vision_feature_layer = -1
    config.vision_feature_select_strategy = _strategy(tower)
    config.image_seq_length = (tower.config.image_size // tower.config.patch_size) ** 2
    kept = {name: value for name, value in student.state_dict().items() if not name.startswith((_TOWER, _PROJECTOR))}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        projector = type(student.model.multi_modal_projector)(config)  # torch's own start, as in LLaVA's code
    for prefix, part in ((_TOWER, tower), (_PROJECTOR, projector)):
        kept |= {f"{prefix}{name}": value.to(student.dtype) for name, value in part.state_dict().items()}
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config)
    model.load_state_dict(kept, assign=True)
    model.tie_weights()
    model.generation_config = student.generation_config
    return model


def _set_images(processor: Any, images: PreprocessCfg, tower: Any) -> None:
    """Let the processor take its pixels as the teacher does, and count the tower's patches."""
    processor.image_processor = CLIPImageProcessor(
        size={"shortest_edge": images.size},
        crop_size={"height": images.size, "width": images.size},
        image_mean=list(images.mean),
        image_std=list(images.std),
        resample=images.resample,
    )
    processor.patch_size = tower.config.patch_size
    processor.vision_feature_select_strategy = _strategy(tower)
    processor.num_additional_image_tokens = class_tokens(tower)


def _strategy(tower: Any) -> str:
    return "default" if class_tokens(tower) else "full"  # the default leaves the class token out


def main(words: list[str] | None = None) -> int:
    """Parse the command line and write the folder. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", type=Path, required=True, help="folder of a LLaVA")
    parser.add_argument("--teacher", required=True, help="folder or name, as teacher.path")
    parser.add_argument("--output", type=Path, required=True, help="new folder")
    for name in ("mean", "std"):
        parser.add_argument(f"--teacher.{name}", dest=name, type=float, nargs=3, help="red, green and blue")
    parser.add_argument("--seed", type=int, default=0, help="seed of the projector's weights")
    options = parser.parse_args(words)
    try:
        exchange(**vars(options))
    except MedAlignError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
