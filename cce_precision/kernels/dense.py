"""The dense backward: dZ of one run of columns at a time, then two library products.

For each run of columns a kernel recomputes the logits and writes dZ in the operand's dtype (a hi + lo pair for SPLIT); then
dC[run] = dZ^T E, complete over the tokens and hence rounded once, and dE += dZ C[run] in fp32. No atomics: bitwise repeatable.
The width of a run follows from the workspace that the caller allows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..numerics import Operand
from ..problem import Heads, Plan, Problem, Upstream
from .dz import write_dz
from .terms import TokensByTarget, clean_rows, finish_columns, label_rows, row_terms, weighted_sum

__all__ = ["dense_backward"]

DEFAULT_WORKSPACE_MB = 256
_NARROWEST = 1024


def accumulate_product(total: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """total (fp32) = a b, or += a b, with fp32 accumulation. On the CPU (interpreted kernels) by way of fp32 copies."""
    if a.device.type == "cuda" and a.dtype is not torch.float32:
        if first:
            torch.ops.aten.mm.dtype_out(a, b, torch.float32, out=total)
        else:
            torch.ops.aten.addmm.dtype_out(total, a, b, torch.float32, out=total)
        return
    a, b = a.to(torch.float32), b.to(torch.float32)
    if first:
        torch.mm(a, b, out=total)
    else:
        total.addmm_(a, b)


def run_width(problem: Problem, plan: Plan, need: tuple[bool, bool, bool]) -> int:
    """Columns a run: as many as the workspace holds beside the fp32 sums of dE and the copy of e."""
    need_e, need_c, _ = need
    megabytes = DEFAULT_WORKSPACE_MB if plan.workspace_mb is None else plan.workspace_mb
    size = problem.operand_dtype.itemsize
    fixed = problem.n * problem.d * (size + (4 if need_e else 0))
    buffers = 2 if split_operand(problem, plan) else 1
    column = problem.n * size * buffers + (problem.d * 4 if need_c else 0)
    width = max(_NARROWEST, (megabytes * 2**20 - fixed) // column // 256 * 256)
    runs = -(-problem.v // width)
    return -(-problem.v // (runs * 256)) * 256


def split_operand(problem: Problem, plan: Plan) -> bool:
    return plan.variant.operand is Operand.SPLIT and problem.operand_dtype is not torch.float32


def dense_backward(
    problem: Problem, plan: Plan, heads: Heads, upstream: Upstream, need: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(dE, dC, dbias) in the dtypes of e, c and bias; None where not needed. Sums in fp32, each rounded once."""
    need_e, need_c, need_bias = need
    n, v, d, device = problem.n, problem.v, problem.d, problem.e.device
    terms = row_terms(problem, plan, heads, upstream, problem.targets)
    e = clean_rows(problem)
    weight = problem.column_weight
    segments = None if terms.label_inside else TokensByTarget.of(problem.targets, v)
    weighted_e = weighted_sum(e, terms.sigma) if terms.smooth_apart and need_c else None
    weighted_c = weighted_sum(problem.c, weight) if terms.smooth_apart and need_e else None

    width = min(run_width(problem, plan, need), -(-v // 8) * 8)
    dz = torch.empty((2 if split_operand(problem, plan) else 1, n, width), dtype=problem.operand_dtype, device=device)
    d_e = label_rows(problem, terms, weighted_c) if need_e else None
    d_c = torch.empty((v, d), dtype=problem.c.dtype, device=device) if need_c else None
    sum_c = torch.empty((width, d), dtype=torch.float32, device=device) if need_c else None
    d_bias = torch.empty(v, dtype=torch.float32, device=device) if need_bias else None

    for start in range(0, v, width):
        run = slice(start, min(start + width, v))
        size = run.stop - run.start
        c = problem.c[run]
        bias = None if problem.bias is None else problem.bias[run]
        run_weight = None if weight is None else weight[run]
        operands = [buffer[:, :size] for buffer in dz]
        sums = write_dz(problem, e, c, start, terms, operands[0], operands[1] if len(operands) > 1 else None, bias, run_weight, need_bias)
        if d_bias is not None and sums is not None:
            d_bias[run] = sums
        if d_c is not None and sum_c is not None:
            for i, x in enumerate(operands):
                accumulate_product(sum_c[:size], x.T, e, i == 0)
            finish_columns(d_c, sum_c[:size], start, e, terms, segments, weighted_e, run_weight, None)
        if d_e is not None:
            for x in operands:
                accumulate_product(d_e, x, c, False)

    out_e = None
    if d_e is not None:
        del dz, sum_c
        out_e = torch.mul(d_e, terms.scale, out=torch.empty((n, d), dtype=problem.e.dtype, device=device))
    out_bias = None
    if d_bias is not None and problem.bias is not None:
        if terms.smooth_apart:
            total = terms.sigma.sum()
            d_bias -= total if weight is None else weight * total
        out_bias = torch.mul(d_bias, terms.scale).to(problem.bias.dtype)
    return out_e, d_c, out_bias
