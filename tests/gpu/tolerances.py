"""The allowed error of a kernel relative to the reference in float64, derived from rounding and the lengths of sums.

All are relative errors in norm. Products of half precision are exact in float32. Float32 is multiplied as three TF32
products (`input_precision="tf32x3"`): what they leave out, the product of the two low parts and the last bits of the
operands, is 2^-21 of each product, with either sign, so 2^-21 / sqrt(K) of a sum of K unrelated products. Tensor cores
cut off partial sums, 2^-23 each, where they add 8 products at a time; partial sums of unrelated products stay near
1 / sqrt(K) of the lengths, so the K / 8 cuts make sqrt(K) / 8 * 2^-23. `SAFETY` covers that neither is a bound. One
TF32 product in place of three errs by 2^-10.5 / sqrt(K), which the gradients' limits refuse (tests/unit/kernels).
"""

from __future__ import annotations

import torch

SAFETY = 4
SINGLE = 2.0**-24  # unit roundoff of float32
ELEMENTARY = 2.0**-21  # of an exponential, a logarithm, a root and a quotient, as the hardware approximates them


def roundoff(dtype: torch.dtype) -> float:
    """Return the unit roundoff: the largest relative error of one rounding."""
    return torch.finfo(dtype).eps / 2


def product(dtype: torch.dtype, terms: int) -> float:
    """Return the error of the product of two unrelated vectors of `terms` channels, relative to their lengths."""
    left_out = 2.0**-21 / terms**0.5 if dtype == torch.float32 else 0.0
    return SAFETY * (left_out + terms**0.5 / 8 * 2.0**-23)


def similarity(
    student: torch.dtype, teacher: torch.dtype, widths: tuple[int, int], difference: float
) -> tuple[float, float]:
    """Return the limits of value and gradient.

    `difference` is the root mean square of D = cos - cos', by which both errors are divided.
    Value: twice the relative error of D, and the sum of D's squares. Gradient: D once in each of its two terms; in half
    precision D, the gradient, and its product with the upstream one are each rounded.
    """
    cosines = product(student, widths[0]) + product(teacher, widths[1])
    relative = cosines / difference + ELEMENTARY
    roundings = 3 * roundoff(student) if student != torch.float32 else 0.0
    return 2 * relative + 16 * SINGLE, 2 * relative + 16 * SINGLE + 1.3 * roundings


def attention(dtype: torch.dtype, width: int, softcap: float | None = None) -> tuple[float, float]:
    """Return the limits of value and gradients, for scores of standard deviation 1.

    An absolute error of a score is a relative one of its probability, and of the sum that divides it. A softcap's tanh
    is good to 2^-23, and is multiplied by the cap. Gradient: the probability, and the product with the keys; in half
    precision the score gradients and the result are each rounded.
    """
    scores = product(dtype, width) * width**0.5 + ELEMENTARY + (softcap or 0.0) * 2.0**-22
    roundings = 2 * roundoff(dtype) if dtype != torch.float32 else 0.0
    return 2 * scores, 4 * scores + 1.3 * roundings
