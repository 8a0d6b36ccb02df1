"""The cross-entropy of a large-vocabulary linear head without its logits, in variants of known error."""

import importlib
from typing import Any

from .choosing import Candidate, Choice, choose
from .interface import (
    FilterStatistics,
    LinearCrossEntropy,
    LinearCrossEntropyOutput,
    compute_z_loss,
    linear_cross_entropy,
)
from .migration import LinearCrossEntropyImpl
from .numerics import Accumulation, Filter, FilterKind, Granularity, Operand, Path, Variant
from .parallel import VocabParallelOptions

__all__ = [
    "Accumulation",
    "Candidate",
    "Choice",
    "Filter",
    "FilterKind",
    "FilterStatistics",
    "Granularity",
    "LinearCrossEntropy",
    "LinearCrossEntropyImpl",
    "LinearCrossEntropyOutput",
    "Operand",
    "Path",
    "Variant",
    "VocabParallelOptions",
    "cce_counts",
    "cce_patch",
    "choose",
    "compute_z_loss",
    "linear_cross_entropy",
    "uncce_patch",
]

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """The patches of transformers' models come when they are asked for."""
    if name in ("cce_counts", "cce_patch", "uncce_patch"):
        return getattr(importlib.import_module(".huggingface", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
