"""The cross-entropy of a large-vocabulary linear head without its logits, in variants of known error."""

from .interface import (
    FilterStatistics,
    LinearCrossEntropy,
    LinearCrossEntropyOutput,
    compute_z_loss,
    linear_cross_entropy,
)
from .numerics import Accumulation, Filter, FilterKind, Granularity, Operand, Path, Variant
from .parallel import VocabParallelOptions

__all__ = [
    "Accumulation",
    "Filter",
    "FilterKind",
    "FilterStatistics",
    "Granularity",
    "LinearCrossEntropy",
    "LinearCrossEntropyOutput",
    "Operand",
    "Path",
    "Variant",
    "VocabParallelOptions",
    "compute_z_loss",
    "linear_cross_entropy",
]

__version__ = "0.1.0"
