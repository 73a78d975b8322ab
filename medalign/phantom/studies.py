"""Generate a study from a seed and an index."""

from __future__ import annotations

import numpy as np

from medalign.phantom.anatomy import FLUID, draw_chest, expose, skeleton, soft_tissue, vessels
from medalign.phantom.contracts import Study
from medalign.phantom.findings import add_finding, draw_sites
from medalign.phantom.language import ask, write_report

SPLITS = ("train", "val", "test", "pretrain")  # "pretrain": training data of teachers and base models


def stream(seed: int, split: str) -> int:
    """Return the seed of the studies of a split. Different splits never share one, whatever the data set's seed."""
    return len(SPLITS) * seed + SPLITS.index(split)


def study(seed: int, index: int) -> Study:
    """Generate study `index` of the stream `seed`: one radiograph with 96 to 128 pixels on its longer side."""
    rng = np.random.default_rng([seed, index])
    sites = draw_sites(rng)
    chest = draw_chest(rng, enlarged_heart=any(site[0] == "cardiomegaly" for site in sites))
    density = soft_tissue(rng, chest)
    density += vessels(rng, chest) * (chest.fields["right"] + chest.fields["left"])
    findings = [add_finding(rng, chest, density, site) for site in sites]
    density += 0.9 * chest.heart * (FLUID - density)
    density += skeleton(rng, chest)
    return Study(expose(rng, density), findings, write_report(rng, findings), ask(rng, findings))
