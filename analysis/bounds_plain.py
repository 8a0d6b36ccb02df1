"""Bounds of PyTorch's own backward pass for stored logits."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from cce_precision.analysis.bounds_gradients import Factors, GradientBounds, Rows
from cce_precision.analysis.bounds_logits import flushed, precision
from cce_precision.analysis.bounds_model import Computed, Machine, largest
from cce_precision.analysis.budget_stages import ALL_STAGES, Stage, Stages, stage_dtype
from cce_precision.problem import Problem

__all__ = ["plain_gradients"]


def plain_gradients(
    problem: Problem,
    machine: Machine,
    factors: Factors,
    blocks: Callable[[], Iterable[Rows]],
    c: Tensor,
    weight: Tensor,
    stages: Stages = ALL_STAGES,
) -> GradientBounds:
    """Bounds for PyTorch's autograd of `eager/plain.py`. No late scaling: dZ is rounded as it comes."""
    p, (v, d) = precision(problem, machine, Stage.PRODUCT, stages), c.shape
    stored = stage_dtype(stages, Stage.PRODUCT, problem.operand_dtype)
    last = lambda x, dtype: _stored(x, problem, dtype, stages)  # noqa: E731
    value, error, absolute = (torch.zeros_like(c) for _ in range(3))
    bias = [torch.zeros(v, dtype=torch.float64, device=c.device) for _ in range(3)]
    rows_e, n, most = [], 0, 0.0
    for rows in blocks():
        dz = _plain_dz(problem, machine, factors.at(rows.place), rows, weight, stages)
        n += len(rows.targets)
        out, size = dz.value @ c, dz.upper @ c.abs()
        own = dz.error @ c.abs() + machine.products(
            p, v, size, out.abs(), stored, exact=False, largest=largest(dz.upper, c)
        )
        own = own + flushed(dz, c.T, stored, machine)
        most = max(most, largest(dz.upper, rows.e))
        rows_e.append(last(Computed(out, own), problem.e.dtype))
        value += dz.value.T @ rows.e
        error += dz.error.T @ rows.e.abs() + flushed(Computed(dz.value.T, dz.error.T), rows.e.T, stored, machine)
        absolute += dz.upper.T @ rows.e.abs()
        for total, part in zip(bias, (dz.value, dz.error, dz.upper), strict=True):
            total += part.sum(0)
    error = error + machine.products(p, n, absolute, value.abs(), stored, exact=False, largest=most)
    depth = machine.sum_depth(problem.n, inner=False)
    d_bias = Computed(bias[0], bias[1] + depth * p.u * bias[2])
    bias_dtype = p.dtype if problem.bias is None else problem.bias.dtype
    return GradientBounds(
        torch.cat(rows_e) if rows_e else torch.zeros(0, d, dtype=torch.float64, device=c.device),
        last(Computed(value, error), problem.c.dtype),
        last(d_bias, bias_dtype),
    )


def _stored(x: Computed, problem: Problem, dtype: torch.dtype, stages: Stages) -> Tensor:
    """Error after rounding to the logits' dtype, and then to the input's."""
    for kind in (problem.operand_dtype, dtype):
        kind = stage_dtype(stages, Stage.OUTPUT, kind)
        if kind not in (problem.compute_dtype, torch.float64):
            x = x.stored(kind)
    return x.error


def _plain_dz(problem: Problem, machine: Machine, f: Factors, rows: Rows, weight: Tensor, stages: Stages) -> Computed:
    """(B, V) gradient of the stored logits, each head's part formed by itself and all added up in some order."""
    s, stored = rows.softmax, stage_dtype(stages, Stage.DZ, problem.operand_dtype)
    p = precision(problem, machine, Stage.SOFTMAX, stages)
    is_target = torch.zeros_like(s.p.value, dtype=torch.bool).scatter_(1, rows.targets[:, None], True)
    one_hot = Computed.exact(is_target.double())
    beta = f.nll.column()
    value = torch.where(is_target, -s.complement.value[:, None], s.p.value) * f.nll.value[:, None]
    part = (beta * s.p).rounded(p, 2)
    error = part.error + is_target * (2 * p.u * beta.upper + beta.error * one_hot.value)
    x, size, parts = Computed(value, error), part.upper + is_target * beta.upper, 1
    depth = machine.sum_depth(problem.v)
    through_lse = f.lse
    if f.smooth is not None:
        sigma = f.smooth.column()
        direct = (sigma * Computed.exact(weight)).rounded(p)
        total = Computed.exact(weight).sum(0, p, depth)
        rest = (f.smooth * total).rounded(p)
        through_lse = rest if through_lse is None else (through_lse + rest).rounded(p)
        x, size, parts = x - direct, size + direct.upper, parts + 1
    if through_lse is not None:
        part = (through_lse.column() * s.p_lse).rounded(p, 2)
        x, size, parts = x + part, size + part.upper, parts + 1
    if f.entropy is not None:
        log_p = s.log_p
        inner = (s.p * Computed(1 + log_p.value, log_p.error).rounded(p)).rounded(
            p, 2
        )  # gradient of -H / kappa at log P
        mean = inner.sum(1, p, depth)
        part = (inner - (s.p * mean.column()).rounded(p, 2)).rounded(p)
        part = (f.entropy.column() * part).rounded(p, 2)
        x, size, parts = x - part, size + part.upper + f.entropy.column().upper * inner.upper, parts + 1
    x = Computed(x.value, x.error + parts * p.u * size)
    p = precision(problem, machine, Stage.DZ, stages)
    if problem.temperature != 1.0:
        x = Computed(x.value / problem.temperature, x.error / problem.temperature).rounded(p, 3)
    if stored != p.dtype:
        x = x.stored(stored)
    if problem.softcap is None:
        return x
    assert s.slope is not None
    low = (lambda y: y.stored(stored)) if stored != p.dtype else (lambda y: y)
    x = low(Computed(x.value * problem.softcap, x.error * problem.softcap).rounded(p, 2))
    x = low((x * s.slope).rounded(p, 2))
    return low(Computed(x.value / problem.softcap, x.error / problem.softcap).rounded(p, 3))
