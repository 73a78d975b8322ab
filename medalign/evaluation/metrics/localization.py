"""How well maps outline the regions they should show, over a set of samples.

| key | meaning | uniform map |
| --- | --- | --- |
| NAME_ap | mean average precision of the order of the patches | NAME_ap_uniform |
| NAME_iou | mean IoU with the patches that reach NAME_iou_threshold | NAME_iou_uniform |
| NAME_iou_threshold | share of a map's largest value, the best one for the whole set | |

The threshold is one for all samples, so it is fitted to a single number of the set. A uniform map scores the
share of the image that the region covers, in both.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from medalign.errors import DataError
from medalign.evaluation.grounding import check_map
from medalign.evaluation.metrics.intervals import mean
from medalign.evaluation.metrics.predictions import Prediction, rounded
from medalign.evaluation.overlap import THRESHOLDS, Region, average_precision, ious
from medalign.geometry import CanvasFrame, PatchGrid

Case = tuple[np.ndarray, Region]  # a map and the region it should show, which is not empty


def localization(name: str, cases: Sequence[Case], groups: Sequence[str] | None = None) -> dict[str, float]:
    """Compute the scores of the table above. They are omitted if there is no case.

    Args:
        name: the beginning of the keys.
        cases: maps and regions.
        groups: see `intervals.mean`.
    """
    if not cases:
        return {}
    iou_ST = np.stack([ious(*case) for case in cases])
    best = int(iou_ST.mean(0).argmax())
    uniform = mean("area", [region.area for _, region in cases], groups)["area"]
    return {
        **mean(f"{name}_ap", [average_precision(*case) for case in cases], groups),
        f"{name}_ap_uniform": uniform,
        **mean(f"{name}_iou", iou_ST[:, best].tolist(), groups),
        f"{name}_iou_uniform": uniform,
        f"{name}_iou_threshold": float(THRESHOLDS[best]),
    }


def boxed_cases(rows: Sequence[Prediction], grid: PatchGrid) -> list[Case]:
    """Return the question's attention and the boxes of each row that has both.

    Args:
        rows: predictions.
        grid: the grid of the attention.

    Raises:
        DataError: the attention of a row does not fit the grid.
    """
    cases = []
    for row in rows:
        if row.attention is None or row.image_size is None or not row.boxes:
            continue
        try:
            map_N = check_map(rounded(row.attention), grid)
        except ValueError as error:
            raise DataError(f"prediction {row.key!r}: {error}; evaluate again") from error
        region = Region.of_boxes(row.boxes, CanvasFrame(*row.image_size), grid)
        if region.inside_N.any():
            cases.append((map_N, region))
    return cases
