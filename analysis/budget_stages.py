"""The stages of a call, in their order: where a variant's numerics can round, drop or sample."""

from __future__ import annotations

import enum

import torch

__all__ = ["ALL_STAGES", "STAGES", "Stage", "Stages", "stage_dtype"]


class Stage(str, enum.Enum):
    """A part of a call that rounds as the variant's record says, or is exact."""

    LOGITS = "logits"  # z = cap(e c^T + bias) / temperature, and its rounding where it is stored
    SOFTMAX = "lse and P"  # nll, lse and P from the logits
    FILTER = "filter"  # P^ from P
    DZ = "dZ"  # x = P^ - onehot times the upstream gradient, and its rounding as an operand
    PRODUCT = "second product"  # x C and x^T E of one run of columns or tokens
    SUM = "accumulation"  # over runs; in the gradient's own dtype for INPUT and KAHAN
    OUTPUT = "output"  # the one rounding of a sum in fp32


STAGES = tuple(Stage)
Stages = frozenset[Stage]  # those that round as the record says
ALL_STAGES: Stages = frozenset(STAGES)


def stage_dtype(stages: Stages, stage: Stage, dtype: torch.dtype) -> torch.dtype:
    """What a stage computes in: `dtype`, the problem's own, or fp64 where it is exact."""
    return dtype if stage in stages else torch.float64
