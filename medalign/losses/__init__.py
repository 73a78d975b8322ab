"""The terms of the training loss, one a file, and the objective that adds them up."""

from medalign.losses.attention import attention_kl

__all__ = ["attention_kl"]
