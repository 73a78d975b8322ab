"""VCD: Visual Contrastive Decoding (Leng et al., CVPR 2024, arXiv 2311.16922).

    logits = (1 + alpha) l(v) - alpha l(v')                         v: the image, v': the image with noise
    v' = sqrt(a_T) v + sqrt(1 - a_T) n,  n ~ N(0, I)                a_T = prod_{t <= T} (1 - b_t)
    plausible tokens: p(v) >= beta max p(v)

The noise is that of a diffusion process of 1000 steps, b_t = 1e-5 + (5e-3 - 1e-5) sigmoid(s_t), with s_t from -6 to 6
in equal distances. It is added to the normalized pixels, as the tower takes them, once per image.

The authors (github.com/DAMO-NLP-SG/VCD) sample from the contrast; here that is `do_sample`. The defaults are those of
their evaluations: alpha 1, beta 0.1, T = 500.

Shape suffixes: B samples, V vocabulary size, I images, C channels, S pixels per side.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from medalign.contracts import Batch
from medalign.decoding.base import Decoding, setting
from medalign.decoding.contrast import Contrast, amplify, plausible
from medalign.decoding.nucleus import generator_of
from medalign.student.model import Student

_STEPS = 1000


@dataclass(frozen=True)
class VCD(Contrast):
    """Contrast with a noised image."""

    name: ClassVar[str] = "vcd"
    seeded: ClassVar[bool] = True

    alpha: float = setting(1.0, "weight of the contrast", least=0, most=1000)
    beta: float = setting(0.1, "smallest probability of a token, relative to the most probable one", least=0, most=1)
    noise_step: int = setting(500, "step of the diffusion that gives the noise", least=0, most=_STEPS - 1)

    @contextmanager
    def second_view(self, student: Student, batch: Batch, decoding: Decoding) -> Iterator[Batch]:
        """See `Contrast.second_view`."""
        keys = [batch.keys[sample] for sample in batch.image_sample.tolist()]
        noise_ICSS = noise_of(batch.student_pixels, keys, decoding.seed)
        kept = signal_left(self.noise_step)
        yield replace(batch, student_pixels=kept**0.5 * batch.student_pixels + (1 - kept) ** 0.5 * noise_ICSS)

    def combine(self, first_BV: torch.Tensor, second_BV: torch.Tensor, step: int) -> torch.Tensor:
        """See `Contrast.combine`."""
        return plausible(amplify(first_BV, second_BV, self.alpha), first_BV, self.beta)


def signal_left(step: int) -> float:
    """Return a_T, the share of the image's variance that is left at a step of the diffusion."""
    b_T = 1e-5 + (5e-3 - 1e-5) * torch.linspace(-6, 6, _STEPS, dtype=torch.float64).sigmoid()
    return float((1 - b_T)[: step + 1].prod())


def noise_of(pixels_ICSS: torch.Tensor, keys: list[str], seed: int) -> torch.Tensor:
    """Return normal noise for each image, which depends only on the seed, its sample's key, and its place there.

    Args:
        pixels_ICSS: the images.
        keys: the key of the sample of each image. The images of a sample are consecutive.
        seed: of all samples.
    """
    generators: dict[str, torch.Generator] = {}
    noise = []
    for key in keys:
        generator = generators.setdefault(key, generator_of(seed, f"{key}/noise"))
        noise.append(torch.randn(pixels_ICSS.shape[1:], generator=generator))
    return torch.stack(noise).to(pixels_ICSS)
