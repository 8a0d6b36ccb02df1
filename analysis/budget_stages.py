"""The stages of a call, in their order: where a variant's numerics can round, drop or sample."""

from __future__ import annotations

import dataclasses
import enum

import torch

from cce_precision.numerics import NO_FILTER, Accumulation, Operand, Variant

__all__ = ["ALL_STAGES", "STAGES", "Stage", "Stages", "stage_dtype", "with_exact_stages"]


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


def with_exact_stages(variant: Variant, stages: Stages) -> Variant:
    """The record without the filters, the rounding of dZ and the low-precision sums of stages that are exact."""
    changed: dict[str, object] = {}
    if Stage.FILTER not in stages:
        changed |= {"filter_e": NO_FILTER, "filter_c": NO_FILTER}
    if Stage.DZ not in stages:
        changed |= {"operand": Operand.FP32, "flushed": False}
    if Stage.SUM not in stages:
        changed |= {"accum_e": Accumulation.FP32, "accum_c": Accumulation.FP32}
    return dataclasses.replace(variant, **changed)  # type: ignore[arg-type]
