"""The backward pass that keeps a tolerance: the variant's filter where it can promise its error, else nothing is
filtered.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from ..problem import Heads, Plan, Problem, Upstream
from ..promise import filter_error
from .backward import Backward
from .backward import backward as under_filter
from .statistics import seen_of

__all__ = ["backward"]


def backward(
    problem: Problem,
    plan: Plan,
    heads: Heads,
    upstream: Upstream,
    need: tuple[bool, bool, bool],
    seed: Tensor,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(dE, dC, dbias) in the dtypes of e (the compute dtype for plan.partial_e), c and bias; None where `need` says so.
    `seed`: 0-dim int64, for random filters. With plan.tolerance a CPU computes the exact gradient where it is needed;
    another device always does, and takes one or the other without telling the host.
    """
    plain = dataclasses.replace(plan, tolerance=None)
    filtered = under_filter(problem, plain, heads, upstream, need, seed)
    if plan.tolerance is None or not (need[0] or need[1]):
        return filtered
    pass_ = Backward(problem, plain, heads, upstream, seed)
    error = filter_error(problem, plan.variant.filter_e, seen_of(pass_), pass_.scale, filtered[:2])
    kept = error <= plan.tolerance
    if kept.device.type == "cpu" and bool(kept):
        return filtered
    exact = under_filter(problem, dataclasses.replace(plain, variant=plan.variant.exact()), heads, upstream, need, seed)
    d_e, d_c, d_bias = (None if a is None or b is None else torch.where(kept, a, b) for a, b in zip(filtered, exact))
    return d_e, d_c, d_bias
