"""The user's own alternative: the logits in memory, and PyTorch's operations and autograd from there on."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from ..numerics import Path
from ..problem import Heads, Plan, Problem

__all__ = ["plain_heads"]


def _expression(
    e: Tensor,  # (N, D)
    c: Tensor,  # (V, D)
    targets: Tensor,  # (N,)
    bias: Tensor | None,  # (V,)
    weight: Tensor | None,  # (V,)
    plan: Plan,
    want_lse: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    dtype = torch.promote_types(e.dtype, c.dtype)
    valid = targets >= 0
    e = e.masked_fill(~valid[:, None], 0)  # an ignored token may hold anything
    logits = F.linear(e.to(dtype), c.to(dtype), None if bias is None else bias.to(dtype))
    if plan.softcap is not None:
        logits = plan.softcap * torch.tanh(logits / plan.softcap)
    logits = logits.to(torch.promote_types(dtype, torch.float32))
    if plan.temperature != 1.0:
        logits = logits / plan.temperature
    nll = F.cross_entropy(logits, targets, ignore_index=-1, reduction="none")
    keep = lambda x: torch.where(valid, x, 0)  # noqa: E731
    lse = torch.logsumexp(logits, 1) if want_lse or plan.want_smooth else None
    entropy = smooth = argmax = None
    if plan.want_entropy:
        log_p = torch.log_softmax(logits, 1)
        entropy = keep(-(log_p.exp() * log_p.clamp(min=-1024)).sum(1))
    if plan.want_smooth:
        assert lse is not None
        gap = lse[:, None] - logits
        smooth = keep(gap.sum(1) if weight is None else gap @ weight)
    if plan.want_argmax:
        argmax = torch.where(valid, logits.argmax(1), 0)
    return nll, None if lse is None else keep(lse), entropy, smooth, argmax


@functools.cache
def _compiled() -> object:
    return torch.compile(_expression)


def plain_heads(problem: Problem, plan: Plan, want_lse: bool) -> Heads:
    """The heads by stored logits, differentiable by PyTorch; lse is empty unless wanted."""
    expression = _compiled() if plan.variant.path is Path.COMPILED else _expression
    with torch.autocast(problem.e.device.type, enabled=False):  # the inputs are cast already
        outputs = expression(  # type: ignore[operator]
            problem.e, problem.c, problem.targets, problem.bias, problem.column_weight, plan, want_lse
        )
    empty = problem.e.new_zeros(0, dtype=problem.compute_dtype)
    return Heads(*(empty if x is None else x for x in outputs))
