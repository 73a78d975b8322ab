"""The terms of the training loss, one a file, and the objective that adds them up."""

from medalign.losses.attention import attention_kl
from medalign.losses.objective import Objective

__all__ = ["Objective", "attention_kl"]
