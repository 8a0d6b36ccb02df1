"""The second products of a run of columns, which the device takes or leaves: the library's products cannot wait for a
decision made there.

dC of the run and dE's part from it are one launch. dC is complete over the tokens: it leaves with the target's terms
added, scaled and rounded once, or it is added to the fp32 sums of a filter's tail.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..problem import Problem
from .elements import DTYPES
from .launch import Config, architecture, multiprocessors, precision_of
from .primitives import grouped, load_tile, multiply_add, round_to, wide
from .terms import RowTerms, TokensByTarget

__all__ = ["add_parts", "config_of", "multiply_where"]


@triton.jit
def add_parts(
    acc, left, right, OF_LEFT: tl.constexpr, DTYPE: tl.constexpr, PARTS: tl.constexpr, PRECISION: tl.constexpr
):
    """acc + left right, where the one in fp32 (left if OF_LEFT) is a sum of PARTS numbers of the other's dtype.

    Three parts are all of fp32; fp16, whose range does not hold the parts of a small number, is widened instead.
    """
    if (tl.float16 == DTYPE) & (PARTS == 3):
        return multiply_add(left.to(tl.float32), right.to(tl.float32), acc, "ieee")
    rest = left if OF_LEFT else right
    for i in tl.static_range(PARTS):
        part = round_to(rest, DTYPE)
        if OF_LEFT:
            acc = multiply_add(part, right, acc, PRECISION)
        else:
            acc = multiply_add(left, part, acc, PRECISION)
        if i + 1 < PARTS:
            rest -= part.to(tl.float32)
    return acc


@triton.jit
def products_kernel(
    total_e,  # (N, D) fp32, in and out; or unused
    out_c,  # (V, D) gradient, or (W, D) fp32 sums, in and out; or unused
    high,  # (N, W) dZ
    low,  # (N, W) what its rounding lost; or unused
    e,  # (N, D) contiguous
    c,  # (W, D)
    targets,  # (N,) int64
    label,  # (N,) fp32
    by_target,  # (N,) int64 tokens sorted by target
    target_starts,  # (V + 1,) int32
    weight,  # (V,) fp32 or unused
    shift,  # (D,) fp32 or unused
    scale,  # () fp32
    active,  # () int32: 0 where nothing is to be done
    shape,  # (N, V, W, D, first column)
    stride_dz,
    stride_c,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    GROUP: tl.constexpr,
    FLAGS: tl.constexpr,  # (dE, dC, low, dC as sums, shift, weight)
    PRECISION: tl.constexpr,
    DTYPE: tl.constexpr,
    PARTS: tl.constexpr,
):
    n, v, width, d, start = shape
    features = tl.cdiv(d, N)
    units_c = tl.cdiv(width, M) * features if FLAGS[1] else 0
    units = units_c + (tl.cdiv(n, M) * features if FLAGS[0] else 0)
    units = tl.where(tl.load(active) != 0, units, 0)
    stride_e = (d, 1)
    for unit in range(tl.program_id(0), units, tl.num_programs(0)):
        of_c = unit < units_c
        own = tl.where(of_c, unit, unit - units_c)
        i, j = grouped(own, tl.cdiv(tl.where(of_c, width, n), M), features, GROUP)
        acc = tl.zeros((M, N), tl.float32)
        if of_c:
            for k in range(0, n, K):
                b = load_tile(e, stride_e, k, j * N, n, d, K, N, False)
                acc = multiply_add(load_tile(high, stride_dz, k, i * M, n, width, K, M, False).T, b, acc, PRECISION)
                if FLAGS[2]:
                    acc = multiply_add(load_tile(low, stride_dz, k, i * M, n, width, K, M, False).T, b, acc, PRECISION)
        else:
            for k in range(0, width, K):
                b = load_tile(c, stride_c, k, j * N, width, d, K, N, False)
                acc = multiply_add(load_tile(high, stride_dz, i * M, k, n, width, M, K, False), b, acc, PRECISION)
                if FLAGS[2]:
                    acc = multiply_add(load_tile(low, stride_dz, i * M, k, n, width, M, K, False), b, acc, PRECISION)
        row, column = i * M + tl.arange(0, M), j * N + tl.arange(0, N)
        at = wide(d) * row[:, None] + column[None, :]
        mask = (row < tl.where(of_c, width, n))[:, None] & (column < d)[None, :]
        if not of_c:
            tl.store(total_e + at, acc + tl.load(total_e + at, mask=mask, other=0.0), mask=mask)
        elif FLAGS[3]:
            tl.store(out_c + at, acc + tl.load(out_c + at, mask=mask, other=0.0), mask=mask)
        else:
            classes = start + row
            first = tl.load(target_starts + tl.minimum(start + i * M, v))
            last = tl.load(target_starts + tl.minimum(start + tl.minimum(i * M + M, width), v))
            for at_token in range(first, last, 16):
                place = at_token + tl.arange(0, 16)
                token = tl.load(by_target + place, mask=place < last, other=0)
                is_class = tl.load(targets + token, mask=place < last, other=-1).to(tl.int32)[None, :]
                x = tl.load(label + token, mask=place < last, other=0.0)[None, :]
                x = tl.where(classes[:, None] == is_class, x, 0.0)
                inside = (place < last)[:, None] & (column < d)[None, :]
                rows = tl.load(e + token[:, None] * d + column[None, :], mask=inside, other=0)
                acc = add_parts(acc, x, rows, True, DTYPE, PARTS, PRECISION)
            if FLAGS[4]:
                w = tl.full((M,), 1.0, tl.float32)
                if FLAGS[5]:
                    w = tl.load(weight + classes, mask=row < width, other=0.0)
                acc -= w[:, None] * tl.load(shift + column, mask=column < d, other=0.0)[None, :]
            value = round_to(acc * tl.load(scale), out_c.dtype.element_ty)
            tl.store(out_c + wide(start) * d + at, value, mask=mask)


def config_of(dtype: str, arch: str) -> Config:
    """The tile of the products of operands of a dtype, whose name ends in "32" or "16"."""
    if dtype.endswith("32"):
        return Config(64, 64, 16, 4, 2)
    return Config(128, 128, 64, 8, 3) if arch == "sm_90" else Config(64, 64, 32, 4, 3)


def multiply_where(
    problem: Problem,
    e: Tensor,  # (N, D) contiguous, ignored rows 0
    c: Tensor,  # (W, D), the columns from `start` on
    start: int,
    terms: RowTerms,
    segments: TokensByTarget,
    high: Tensor,  # (N, W) dZ without the labels
    low: Tensor | None,  # (N, W)
    total_e: Tensor | None,  # (N, D) fp32: += dZ c
    d_c: Tensor | None,  # (V, D): its rows of this run = dZ^T e + labels - weight shift, scaled and rounded once
    sums: Tensor | None,  # (W, D) fp32: += dZ^T e, instead of d_c
    shift: Tensor | None,  # (D,) fp32
    active: Tensor,  # () int32: 0 where nothing is to be done
) -> None:
    """The products of one run, with fp32 accumulation."""
    n, d = e.shape
    width, weight = c.shape[0], problem.column_weight
    cuda = e.device.type == "cuda"
    config = config_of(str(e.dtype), architecture(e.device)) if cuda else Config(16, 32, 16, 4, 1, group=2)
    m, f = config.m, config.n
    out_c = d_c if sums is None else sums
    rows = triton.cdiv(width, m) + triton.cdiv(n, m)
    products_kernel[(min(rows * triton.cdiv(d, f), multiprocessors(e.device)),)](
        terms.terms if total_e is None else total_e,
        terms.terms if out_c is None else out_c,
        high,
        high if low is None else low,
        e,
        c,
        terms.targets,
        terms.label,
        segments.tokens,
        segments.starts,
        terms.terms if weight is None else weight,
        terms.terms if shift is None else shift,
        terms.scale,
        active,
        (n, problem.v, width, d, start),
        tuple(high.stride()),
        tuple(c.stride()),
        M=m,
        N=f,
        K=config.k,
        GROUP=config.group,
        FLAGS=tuple(x is not None for x in (total_e, out_c, low, sums, shift, weight)),
        PRECISION=precision_of(e),
        DTYPE=DTYPES[e.dtype],
        PARTS=1 if e.element_size() == 4 else 3,
        num_warps=config.warps,
        num_stages=config.stages,
    )
