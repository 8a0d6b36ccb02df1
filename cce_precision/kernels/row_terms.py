"""What dZ needs of each token, from the heads and their upstream gradients: two launches, where PyTorch would take some
forty for as many short rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..problem import Heads, Plan, Problem, Upstream, flushed_below
from .entry import entry
from .launch import cdiv
from .primitives import exp, expm1, wide
from .terms import RowTerms

__all__ = ["row_terms"]

NEGLIGIBLE = tl.constexpr(1024.0)  # exp of minus that is 0
_TOKENS = 512  # of a program


@triton.jit
def upstream_factors(targets, upstream, strides, total, rows, n, FLAGS: tl.constexpr):
    """alpha, beta, kappa and sigma of some rows (see problem.py), 0 where ignored, and which rows count."""
    counts = tl.load(targets + rows, mask=rows < n, other=-1) >= 0
    beta = tl.zeros(rows.shape, tl.float32)
    kappa, sigma = beta, beta
    if FLAGS[0]:
        beta = tl.load(upstream[0] + rows * wide(strides[0]), mask=counts, other=0.0).to(tl.float32)
    alpha = beta
    if FLAGS[1]:
        alpha += tl.load(upstream[1] + rows * wide(strides[1]), mask=counts, other=0.0).to(tl.float32)
    if FLAGS[2]:
        kappa = tl.load(upstream[2] + rows * wide(strides[2]), mask=counts, other=0.0).to(tl.float32)
    if FLAGS[3]:
        sigma = tl.load(upstream[3] + rows * wide(strides[3]), mask=counts, other=0.0).to(tl.float32)
        alpha += tl.load(total) * sigma
    return alpha, beta, kappa, sigma, counts


@triton.jit
def finite_size(x):
    """|x|, 0 where it is not finite."""
    size = tl.abs(x)
    return tl.where(size < float("inf"), size, 0.0)


@entry
@triton.jit
def power_kernel(
    targets,  # (N,) int64, -1 where ignored
    upstream,  # four of (N,), those that FLAGS names
    strides,
    total,  # () fp32: sum of the column weights
    power,  # () fp32, out: numerics.power_of_two of the factors
    scale,  # () fp32, out: the same over the temperature
    n,
    temperature,
    TOKENS: tl.constexpr,
    FLAGS: tl.constexpr,  # which heads have an upstream gradient
):
    largest = tl.zeros((TOKENS,), tl.float32)
    for first in range(0, n, TOKENS):
        rows = first + tl.arange(0, TOKENS)
        alpha, beta, kappa, sigma, _ = upstream_factors(targets, upstream, strides, total, rows, n, FLAGS)
        largest = tl.maximum(largest, tl.maximum(finite_size(alpha), finite_size(beta)))
        largest = tl.maximum(largest, tl.maximum(finite_size(kappa), finite_size(sigma)))
    top = tl.max(largest, 0)
    exponent = tl.minimum(tl.maximum((top.to(tl.int32, bitcast=True) >> 23) - 127, -121), 119)
    value = tl.where(top > 0, ((exponent + 127) << 23).to(tl.float32, bitcast=True), 1.0)
    tl.store(power, value)
    tl.store(scale, value / temperature)


@entry
@triton.jit
def row_terms_kernel(
    problem_targets,  # (N,) int64, -1 where ignored
    upstream,  # four of (N,), those that FLAGS names
    strides,
    total,  # () fp32: sum of the column weights
    power,  # () fp32
    nll,  # (N,) fp32
    lse,
    entropy,  # (N,) or unused
    terms,  # (6, N) fp32, out: RowTerms.terms
    label,  # (N,) fp32, out
    n,
    over_cap,  # temperature / softcap
    flushed_below,  # as a multiple of 1 - P_t
    TOKENS: tl.constexpr,
    # which heads have an upstream gradient; whether the label takes the softcap's slope; whether a filter is by
    # element; whether entries are flushed
    FLAGS: tl.constexpr,
):
    rows = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    alpha, beta, kappa, sigma, counts = upstream_factors(problem_targets, upstream, strides, total, rows, n, FLAGS)
    inverse = 1.0 / tl.load(power)  # of a power of two: exact
    alpha, beta, kappa, sigma = alpha * inverse, beta * inverse, kappa * inverse, sigma * inverse
    loss = tl.load(nll + rows, mask=rows < n, other=0.0)
    full = tl.load(lse + rows, mask=rows < n, other=0.0)
    p_t, missing = exp(-loss), expm1(-loss)
    own = (alpha - beta) * p_t + beta * missing
    spread = tl.zeros((TOKENS,), tl.float32)
    if FLAGS[2]:
        spread = tl.load(entropy + rows, mask=rows < n, other=0.0)
        own -= kappa * (spread - tl.minimum(loss, NEGLIGIBLE)) * p_t  # P_t = 0 there, and nll may be inf
    if FLAGS[4]:
        y = (full - loss) * over_cap
        own *= 1.0 - y * y
    at_target = -missing  # what a tile filter compares there: |P - onehot|, and P too for heads beside nll
    if FLAGS[5]:
        at_target = alpha - beta
    elif FLAGS[6]:
        at_target *= flushed_below
    elif FLAGS[1] or FLAGS[2] or FLAGS[3]:
        at_target = tl.maximum(at_target, p_t, propagate_nan=tl.PropagateNan.ALL)
    out = terms + rows
    step = wide(n)
    tl.store(out, tl.where(counts, full, float("inf")), mask=rows < n)
    tl.store(out + step, alpha, mask=rows < n)
    tl.store(out + 2 * step, kappa, mask=rows < n)
    tl.store(out + 3 * step, spread, mask=rows < n)
    tl.store(out + 4 * step, sigma, mask=rows < n)
    tl.store(out + 5 * step, tl.where(counts, at_target, 0.0), mask=rows < n)
    tl.store(label + rows, tl.where(counts, own, 0.0), mask=rows < n)


def row_terms(problem: Problem, plan: Plan, heads: Heads, upstream: Upstream, targets: Tensor) -> RowTerms:
    """The row terms for targets (N,) in visiting order. Formulas: problem.py."""
    n, device = problem.n, problem.e.device
    given = tuple(g is not None for g in upstream)
    shapes = (6, n), (n,), (), ()
    terms, label, power, scale = (torch.empty(shape, dtype=torch.float32, device=device) for shape in shapes)
    total = power
    if upstream.smooth is not None:
        weight = problem.column_weight
        total = torch.full((), float(problem.v), device=device) if weight is None else weight.sum(dtype=torch.float32)
    gradients = tuple(label if g is None else g for g in upstream)
    strides = tuple(g.stride(0) for g in gradients)
    apart = problem.softcap is not None and plan.variant.label_apart
    below = flushed_below(problem, plan)
    if n > 0:
        known = (problem.targets, gradients, strides, total, power)
        power_kernel[(1,)](*known, scale, n, float(problem.temperature), TOKENS=4096, FLAGS=given, num_warps=8)
        row_terms_kernel[(cdiv(n, _TOKENS),)](
            *known,
            heads.nll,
            heads.lse,
            label if upstream.entropy is None else heads.entropy,
            terms,
            label,
            n,
            problem.temperature / (problem.softcap or 1.0),
            below,
            TOKENS=_TOKENS,
            FLAGS=(*given, apart, plan.variant.by_element, below > 0),
        )
    return RowTerms(
        targets=targets,
        terms=terms,
        label=label,
        scale=scale,
        entropy=upstream.entropy is not None,
        smooth_inside=upstream.smooth is not None and problem.softcap is not None,
        smooth_apart=upstream.smooth is not None and problem.softcap is None,
        label_inside=not plan.variant.label_apart,
        flushed=below > 0,
    )
