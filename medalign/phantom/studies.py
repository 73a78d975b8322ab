"""From a seed and a number to a study, always the same one."""

from __future__ import annotations

import numpy as np

from medalign.phantom.anatomy import FLUID, draw_chest, expose, skeleton, soft_tissue, vessels
from medalign.phantom.contracts import Study
from medalign.phantom.findings import add_finding, draw_sites
from medalign.phantom.language import ask, write_report

SPLITS = ("train", "val", "test", "pretrain")  # "pretrain": what teachers and base models are trained on


def stream(seed: int, split: str) -> int:
    """The seed of a split's studies. No two splits share one, whatever the seeds of their data sets."""
    return len(SPLITS) * seed + SPLITS.index(split)


def study(seed: int, index: int) -> Study:
    """Study number `index` of the stream `seed`: one radiograph, 96 to 128 pixels on its longer side."""
    rng = np.random.default_rng([seed, index])
    sites = draw_sites(rng)
    chest = draw_chest(rng, enlarged_heart=any(site[0] == "cardiomegaly" for site in sites))
    density = soft_tissue(rng, chest)
    density += vessels(rng, chest) * (chest.fields["right"] + chest.fields["left"])
    findings = [add_finding(rng, chest, density, site) for site in sites]
    density += 0.9 * chest.heart * (FLUID - density)
    density += skeleton(rng, chest)
    return Study(expose(rng, density), findings, write_report(rng, findings), ask(rng, findings))
