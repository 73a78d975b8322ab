"""The published operation counts are those of the towers."""

import json
from pathlib import Path

import pytest
import torch

from tools.benchmarks import teacher_flops, teacher_share

RESULTS = json.loads((Path(teacher_flops.__file__).parent / "results" / "teacher_flops.json").read_text())


def test_the_table_is_complete():
    assert set(RESULTS["teachers"]) == set(teacher_flops.TEACHERS)


@pytest.mark.parametrize(
    "name", [name for name in teacher_flops.TEACHERS if not {"BiomedCLIP", "RN50", "BioViL"}.isdisjoint(name.split())]
)
def test_counts_can_be_repeated(name):
    with torch.device("meta"):
        tower = teacher_flops.TEACHERS[name]().eval()
    assert teacher_flops.teacher_flops(tower) == pytest.approx(RESULTS["teachers"][name]["gflop"], abs=0.05)


def test_a_count_by_hand():
    """One layer of a product of [2, 3] and [3, 5]: two operations per multiplication."""
    left, right = torch.empty(2, 3, device="meta"), torch.empty(3, 5, device="meta")
    assert teacher_flops.count(lambda: left @ right) == 2 * 2 * 3 * 5 / 1e9


PAIRS = {
    "ViT-L/14 at 336 (UniMed-CLIP)": "UniMed-CLIP ViT-L/14 at 336",
    "ViT-B/16 at 224 (UniMed-CLIP, BiomedCLIP)": "UniMed-CLIP ViT-B/16 at 224",
    "SigLIP So400m/14 at 448 (MedSigLIP)": "MedSigLIP at 448",
    "DINOv2 B/14 at 518 (RAD-DINO)": "RAD-DINO at 518",
    "ResNet-50 of OpenAI at 224 (PubMedCLIP, PMC-CLIP)": "PubMedCLIP RN50 at 224",
    "ResNet-50 at 448 (BioViL)": "BioViL at 448",
}


def test_the_documentation_has_the_counts():
    page = (Path(teacher_flops.__file__).parents[2] / "docs" / "teachers.md").read_text()
    for name, found in RESULTS["teachers"].items():
        assert f"| {name} | {found['million_parameters']:.0f} M | {found['gflop']:.0f} | " in page, name


@pytest.mark.parametrize("name", PAIRS)
def test_the_measured_share_is_near_the_counted_one(name):
    """Kernels reach different parts of the peak: within 30 % of each other."""
    measured = json.loads((Path(teacher_flops.__file__).parent / "results" / "teacher_share.json").read_text())
    assert set(measured["share"]) == set(teacher_share.TEACHERS)
    assert measured["share"][name] == pytest.approx(RESULTS["teachers"][PAIRS[name]]["share"], rel=0.3)


def test_a_part_of_a_tower_has_its_real_width_and_patches():
    with torch.device("meta"):
        part = teacher_share.TEACHERS["ViT-L/14 at 336 (UniMed-CLIP)"].build()
        whole = teacher_flops.TEACHERS["UniMed-CLIP ViT-L/14 at 336"]()
    assert (part.grid, part.width, len(part.blocks())) == (whole.grid, whole.width, teacher_share.MEASURED)
    assert len(whole.blocks()) == teacher_share.TEACHERS["ViT-L/14 at 336 (UniMed-CLIP)"].depth
