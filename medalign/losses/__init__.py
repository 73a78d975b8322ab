"""The terms of the training loss, one per file, and the objective that sums them."""

from medalign.losses.attention import AttentionTerm, attention_kl
from medalign.losses.build import build_objective, build_terms
from medalign.losses.language_model import LanguageTerm
from medalign.losses.objective import Objective
from medalign.losses.term import LossTerm
from medalign.losses.token_similarity import SimilarityTerm

__all__ = [
    "AttentionTerm",
    "LanguageTerm",
    "LossTerm",
    "Objective",
    "SimilarityTerm",
    "attention_kl",
    "build_objective",
    "build_terms",
]
