"""Attention sinks: a few patches, often of the background, that hold much of a large tower's attention.

Such patches have outlying norms and carry global information: Darcet et al., "Vision Transformers Need Registers", ICLR
2024. A student that imitates them looks at nothing in particular.

Shape suffixes: I images, M patches of the teacher, N patches of the student's grid, b the tower's width.
"""

from __future__ import annotations

import logging
import math
from typing import NamedTuple

import torch

from medalign.contracts import Batch, TeacherTargets

log = logging.getLogger("medalign")

TOP = 0.01  # the share of patches that is looked at, at least one patch
MAX_TOP_SHARE = 0.3  # a warning is given if these patches hold more of the attention,
MAX_PADDING_SHARE = 0.1  # or if more of it lies on padding
IMAGES = 32  # images over which the first report is made


def mask_outliers(attention: torch.Tensor, norms: torch.Tensor, ratio: float) -> torch.Tensor:
    """Set the attention to patches with an outlying norm to zero.

    Args:
        attention: [I, M].
        norms: norm of each patch of the residual stream that leaves the last block, [I, M]. It separates sinks from
            other patches.
        ratio: a norm is outlying if it is larger than this multiple of the median over the image.

    Returns:
        The attention [I, M]. It is not normalized again.
    """
    return attention.masked_fill(norms > ratio * norms.median(dim=1, keepdim=True).values, 0)


class SinkShares(NamedTuple):
    """Where the attention of images lies, each as its share of the whole."""

    top: torch.Tensor  # [I]; in the TOP share of patches with the most attention
    padding: torch.Tensor  # [I]; on patches that show only canvas padding


def sink_shares(attention: torch.Tensor, patch_valid: torch.Tensor) -> SinkShares:
    """Measure where the attention targets lie.

    Args:
        attention: attention targets, [I, N].
        patch_valid: bool [I, N]; False if a patch shows only canvas padding.
    """
    share_IN = attention / attention.sum(1, keepdim=True)
    count = math.ceil(TOP * share_IN.shape[1])
    return SinkShares(share_IN.topk(count, dim=1).values.sum(1), share_IN.masked_fill(patch_valid, 0).sum(1))


class SinkMonitor:
    """Reports once, over the first images of a start, where the teacher's attention lies. Use it on rank 0 only.

    Args:
        teacher: which teacher: 0 is the first.
    """

    def __init__(self, teacher: int = 0) -> None:
        self._name = f"teacher {teacher + 1}" if teacher else "the teacher"
        self._seen: list[SinkShares] = []
        self._reported = False

    def __call__(self, targets: TeacherTargets, batch: Batch) -> None:
        """Look at the targets of a micro-batch. Each call before the report waits for the device; later ones return."""
        if self._reported or targets.attention is None:
            return
        real_I = batch.image_weight > 0
        if real_I.any():
            self._seen.append(sink_shares(targets.attention[real_I], batch.patch_valid[real_I]))
        if sum(len(shares.top) for shares in self._seen) >= IMAGES:
            self.report(targets.attention.shape[1])

    def report(self, patches: int) -> None:
        """Log the mean shares of the images seen, and warn if they are too large.

        Args:
            patches: N.
        """
        self._reported = True
        top, padding = (100 * float(torch.cat(values).mean()) for values in zip(*self._seen, strict=True))
        log.info(
            "attention of %s: %.1f %% in the top %.0f %% of patches (%.1f %% if even), %.1f %% on padding",
            self._name,
            top,
            100 * TOP,
            100 * math.ceil(TOP * patches) / patches,
            padding,
        )
        # One patch of a small grid is more than TOP of it, and a map that points at a small finding fills it.
        if top > 100 * MAX_TOP_SHARE and TOP * patches >= 1:
            log.warning(
                "more than %.0f %% of the attention of %s lies in few patches: these may be attention sinks, which "
                "show nothing; teacher.mask_sinks leaves out patches with an outlying norm",
                100 * MAX_TOP_SHARE,
                self._name,
            )
        if padding > 100 * MAX_PADDING_SHARE:
            log.warning(
                "more than %.0f %% of the attention of %s lies on padding; losses.ignore_padding leaves it out",
                100 * MAX_PADDING_SHARE,
                self._name,
            )
