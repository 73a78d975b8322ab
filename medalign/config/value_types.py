"""Types of values that several settings share: numbers with a range, and precisions.

jsonargparse checks the range; a type checker sees int or float.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

Precision = Literal["auto", "bf16", "fp32"]

if TYPE_CHECKING:
    ClosedUnitInterval = float
    FiniteFloat = float
    HalfOpenUnitInterval = float
    NonNegativeFloat = float
    NonNegativeInt = int
    PositiveFiniteFloat = float
    PositiveFloat = float
    PositiveInt = int
    Seed = int
else:
    from jsonargparse.typing import (
        ClosedUnitInterval,
        NonNegativeFloat,
        NonNegativeInt,
        PositiveFloat,
        PositiveInt,
        restricted_number_type,
    )

    FiniteFloat = restricted_number_type("FiniteFloat", float, [(">", -math.inf), ("<", math.inf)])
    HalfOpenUnitInterval = restricted_number_type("HalfOpenUnitInterval", float, [(">=", 0), ("<", 1)])
    PositiveFiniteFloat = restricted_number_type("PositiveFiniteFloat", float, [(">", 0), ("<", math.inf)])
    # With a 32-bit seed, the seeds of single steps (`distributed.seed_step`) fit into 64 bits.
    Seed = restricted_number_type("Seed", int, [(">=", 0), ("<", 2**32)])

DESCRIPTIONS = {
    "ClosedUnitInterval": "number in [0, 1]",
    "FiniteFloat": "finite number",
    "HalfOpenUnitInterval": "number in [0, 1)",
    "NonNegativeFloat": "number >= 0",
    "NonNegativeInt": "integer >= 0",
    "PositiveFiniteFloat": "finite number > 0",
    "PositiveFloat": "number > 0",
    "PositiveInt": "integer > 0",
    "Seed": "integer in [0, 2^32)",
}
"""The types in words, for users."""

__all__ = [
    "DESCRIPTIONS",
    "ClosedUnitInterval",
    "FiniteFloat",
    "HalfOpenUnitInterval",
    "NonNegativeFloat",
    "NonNegativeInt",
    "PositiveFiniteFloat",
    "PositiveFloat",
    "PositiveInt",
    "Seed",
]
