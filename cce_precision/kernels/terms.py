"""What the backward passes share: the record of the row terms, the targets in order, and small kernels over rows."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..problem import Problem
from .entry import entry
from .launch import cdiv, next_power_of_2
from .primitives import round_to, wide

__all__ = [
    "RowTerms",
    "TokensByTarget",
    "clean_rows",
    "finish_bias",
    "label_rows",
    "matvec",
    "scale_into",
    "weighted_sum",
]


@dataclass(frozen=True)
class RowTerms:
    """What dZ needs of each token. All fp32, upstream factors divided by one power of two so that dZ is O(1)."""

    targets: Tensor  # (N,) int64 positions in visiting order, -1 where ignored
    # (6, N): lse (inf where ignored, hence P = 0), alpha, kappa, entropy, sigma, and the tile filter's entry at the
    # target or, of a filter by element, alpha - beta, or the probability below which entries are flushed
    terms: Tensor
    # (N,) the target's entry of dZ; before the softcap's slope if it stands in the operand, after it if apart
    label: Tensor
    scale: Tensor  # 0-dim: what the sums are multiplied by at the end, the power of two over the temperature
    entropy: bool  # whether kappa matters
    smooth_inside: bool  # whether -sigma w belongs into x (with a softcap)
    smooth_apart: bool  # whether it is rank one and added apart
    label_inside: bool  # whether the label's entry stands in the operand
    flushed: bool  # whether the last of the terms says what is flushed

    @property
    def sigma(self) -> Tensor:
        return self.terms[4]

    def of(self, chunk: slice) -> RowTerms:
        """Those of some tokens, beside each other."""
        rows = self.terms[:, chunk].contiguous()
        return replace(self, targets=self.targets[chunk], terms=rows, label=self.label[chunk])


@dataclass(frozen=True)
class TokensByTarget:
    """The tokens sorted by target, so that the target's terms of one column are one segment, in the order of the
    tokens.
    """

    tokens: Tensor  # (N,) int64
    starts: Tensor  # (V + 1,) int32 segment of column j is [starts[j], starts[j + 1])

    @staticmethod
    def of(targets: Tensor, v: int) -> TokensByTarget:
        values, tokens = torch.sort(targets, stable=True)
        edges = torch.arange(v + 1, device=targets.device)
        return TokensByTarget(tokens, torch.searchsorted(values, edges, out_int32=True))


@triton.jit
def is_wanted(active, ACTIVE: tl.constexpr):
    """Whether anything is to be done: always, or where `active` (() int32) is not 0."""
    if ACTIVE:
        return tl.load(active) != 0
    else:
        return True


@entry
@triton.jit
def clean_rows_kernel(
    e,
    targets,
    out,
    active,  # () int32: 0 where nothing is to be done, else 1; or unused
    d,
    stride_e,
    COLUMNS: tl.constexpr,
    ACTIVE: tl.constexpr,
):
    row = tl.program_id(0)
    if is_wanted(active, ACTIVE):
        j = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        known = (tl.load(targets + row) >= 0) & (j < d)
        value = tl.load(e + wide(row) * stride_e[0] + j.to(tl.int64) * stride_e[1], mask=known, other=0)
        tl.store(out + wide(d) * row + j, value, mask=j < d)


def clean_rows(
    problem: Problem,
    out: Tensor | None = None,  # (N, D) contiguous
    active: Tensor | None = None,  # () int32: 0 where nothing is to be done, else 1
) -> Tensor:
    """out = e with 0 in ignored rows, so that a NaN there reaches no product."""
    e, width = problem.e, 1024
    if out is None:
        out = torch.empty(e.shape, dtype=e.dtype, device=e.device)
    unused = problem.targets
    clean_rows_kernel[(problem.n, cdiv(problem.d, width))](
        e,
        problem.targets,
        out,
        unused if active is None else active,
        problem.d,
        tuple(e.stride()),
        COLUMNS=width,
        ACTIVE=active is not None,
    )
    return out


@entry
@triton.jit
def label_rows_kernel(
    out,  # (N, D) fp32
    c,  # (V, D)
    targets,  # (N,) rows of c, -1 where ignored, V or more where another process holds the row
    label,  # (N,) fp32
    sigma,  # (N,) fp32
    shift,  # (D,) fp32
    active,  # () int32: 0 where nothing is to be done, else 1; or unused
    v,
    d,
    stride_c,
    COLUMNS: tl.constexpr,
    LABEL: tl.constexpr,
    SHIFT: tl.constexpr,
    ACTIVE: tl.constexpr,
):
    row = tl.program_id(0)
    if is_wanted(active, ACTIVE):
        j = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        value = label_row(c, targets, label, sigma, shift, row, j, v, d, stride_c, LABEL, SHIFT)
        tl.store(out + wide(d) * row + j, value, mask=j < d)


@triton.jit
def label_row(c, targets, label, sigma, shift, row, j, v, d, stride_c, LABEL: tl.constexpr, SHIFT: tl.constexpr):
    """The features j of label_i c_{t_i} - sigma_i shift, fp32, for the token i = row."""
    value = tl.zeros(j.shape, tl.float32)
    target = tl.load(targets + row)
    if target >= 0:
        if LABEL:
            here = (j < d) & (target < v)
            c_t = tl.load(c + target * stride_c[0] + j.to(tl.int64) * stride_c[1], mask=here, other=0)
            value = tl.where(here, tl.load(label + row) * c_t.to(tl.float32), 0.0)
        if SHIFT:
            value -= tl.load(sigma + row) * tl.load(shift + j, mask=j < d, other=0.0)
    return value


def label_rows(
    problem: Problem,
    terms: RowTerms,
    shift: Tensor | None,
    out: Tensor | None = None,
    active: Tensor | None = None,  # () int32: 0 where nothing is to be done, else 1
) -> Tensor:
    """out (N, D) fp32 = label_i c_{t_i} where the label stands apart, minus sigma_i shift."""
    if out is None:
        out = torch.empty((problem.n, problem.d), dtype=torch.float32, device=problem.e.device)
    width = 1024
    label_rows_kernel[(problem.n, cdiv(problem.d, width))](
        out,
        problem.c,
        problem.targets,
        terms.label,
        terms.sigma,
        out if shift is None else shift,
        out if active is None else active,
        problem.v,
        problem.d,
        tuple(problem.c.stride()),
        COLUMNS=width,
        LABEL=not terms.label_inside,
        SHIFT=shift is not None,
        ACTIVE=active is not None,
    )
    return out


@entry
@triton.jit
def scale_kernel(unit, factor, out, active, size, BLOCK: tl.constexpr, ACTIVE: tl.constexpr):
    if is_wanted(active, ACTIVE):
        i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        value = tl.load(unit + i, mask=i < size) * tl.load(factor)
        tl.store(out + i, round_to(value, out.dtype.element_ty), mask=i < size)


def scale_into(out: Tensor, unit: Tensor, factor: Tensor, active: Tensor | None = None) -> None:
    """out = unit (fp32) times factor (0-dim fp32), rounded once; all contiguous. Not done where `active` (0-dim int32)
    is 0.
    """
    scale_kernel[(cdiv(unit.numel(), 4096),)](
        unit,
        factor,
        out,
        factor if active is None else active,
        unit.numel(),
        BLOCK=4096,
        ACTIVE=active is not None,
        num_warps=8,
    )


@entry
@triton.jit
def finish_columns_kernel(
    out,  # (V, D) gradient, rows start to start + W
    total,  # (W, D) fp32 sums
    e,  # (N, D) contiguous
    tokens,  # (N,) int64 sorted by target
    starts,  # (V + 1,) int32
    label,  # (N,) fp32
    weight,  # (W,) fp32 or unused
    shift,  # (D,) fp32 or unused
    scale,  # () fp32
    order,  # (W,) row of out for each column of this run, or unused
    width,
    d,
    start,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TOKENS: tl.constexpr,
    LABEL: tl.constexpr,
    SHIFT: tl.constexpr,
    WEIGHT: tl.constexpr,
    ORDER: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    j = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (rows < width)[:, None] & (j < d)[None, :]
    value = tl.load(total + rows[:, None].to(tl.int64) * d + j[None, :], mask=inside, other=0.0)
    position = wide(start) + rows
    if LABEL:
        for r in tl.static_range(ROWS):
            row = tl.program_id(0) * ROWS + r
            if row < width:
                first, last = tl.load(starts + wide(start) + row), tl.load(starts + wide(start) + row + 1)
                for i in range(first, last, TOKENS):
                    place = i + tl.arange(0, TOKENS)
                    token = tl.load(tokens + place, mask=place < last, other=0)
                    x = tl.load(label + token, mask=place < last, other=0.0)
                    own = (place < last)[:, None] & (j < d)[None, :]
                    term = tl.load(e + token[:, None] * d + j[None, :], mask=own, other=0).to(tl.float32)
                    value += tl.where((rows == row)[:, None], tl.sum(x[:, None] * term, 0)[None, :], 0.0)
    if SHIFT:
        w = tl.full((ROWS,), 1.0, tl.float32)
        if WEIGHT:
            w = tl.load(weight + rows, mask=rows < width, other=0.0)
        value -= w[:, None] * tl.load(shift + j, mask=j < d, other=0.0)[None, :]
    if ORDER:
        position = tl.load(order + rows, mask=rows < width, other=0)
    value = round_to(value * tl.load(scale), out.dtype.element_ty)
    tl.store(out + position[:, None] * d + j[None, :], value, mask=inside)


def finish_columns(
    out: Tensor,  # (V, D)
    total: Tensor,  # (W, D) fp32
    start: int,
    e: Tensor,
    terms: RowTerms,
    segments: TokensByTarget | None,
    shift: Tensor | None,
    weight: Tensor | None,  # (W,)
    order: Tensor | None,  # (W,)
) -> None:
    """out[start : start + W] = the sums plus the target's terms, minus weight x shift, scaled and rounded once."""
    width, d = total.shape
    rows, columns = 4, min(512, next_power_of_2(d))
    finish_columns_kernel[(cdiv(width, rows), cdiv(d, columns))](
        out,
        total,
        e,
        total if segments is None else segments.tokens,
        total if segments is None else segments.starts,
        terms.label,
        total if weight is None else weight,
        total if shift is None else shift,
        terms.scale,
        total if order is None else order,
        width,
        d,
        start,
        ROWS=rows,
        COLUMNS=columns,
        TOKENS=8,
        LABEL=segments is not None,
        SHIFT=shift is not None,
        WEIGHT=weight is not None,
        ORDER=order is not None,
        num_warps=4,
    )


@entry
@triton.jit
def weighted_sum_kernel(
    x,  # (R, D)
    weight,  # (SUMS, R) fp32 or int32, or unused
    out,  # (SUMS, blocks, D) fp32
    rows,
    d,
    rows_a_block,
    stride_x,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WEIGHT: tl.constexpr,
    SUMS: tl.constexpr,
):
    block = tl.program_id(0)
    j = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    which = tl.arange(0, SUMS)
    total = tl.zeros((SUMS, ROWS, COLUMNS), tl.float32)
    first = wide(rows_a_block) * block
    for i in range(first, tl.minimum(first + rows_a_block, rows), ROWS):
        r = i + tl.arange(0, ROWS)
        inside = (r < rows) & (r < first + rows_a_block)
        w = tl.full((SUMS, ROWS), 1.0, tl.float32)
        if WEIGHT:
            w = tl.load(weight + which[:, None] * wide(rows) + r[None, :], mask=inside[None, :], other=0).to(tl.float32)
            inside &= tl.max((w != 0).to(tl.int32), 0) != 0
        place = r[:, None] * stride_x[0] + j[None, :].to(tl.int64) * stride_x[1]
        value = tl.load(x + place, mask=inside[:, None] & (j < d)[None, :], other=0).to(tl.float32)
        total += w[:, :, None] * value[None, :, :]
    to = out + (which[:, None] * tl.num_programs(0) + block) * wide(d) + j[None, :]
    tl.store(to, tl.sum(total, 1), mask=(j < d)[None, :])


def weighted_sum(x: Tensor, weight: Tensor | None) -> Tensor:
    """sum_i weight_i x_i (D,) fp32 over the rows of x (R, D), of which those of weight 0 are not read; fixed order, no
    atomics. Of weights (S, R), S a power of two, the S sums (S, D).
    """
    rows, d = x.shape
    sums = 1 if weight is None or weight.dim() == 1 else weight.shape[0]
    blocks = max(1, min(256, cdiv(rows, 64)))
    rows_a_block = cdiv(cdiv(rows, blocks), 16) * 16
    out = torch.empty((sums, blocks, d), dtype=torch.float32, device=x.device)
    columns = 128
    weighted_sum_kernel[(blocks, cdiv(d, columns))](
        x,
        out if weight is None else weight,
        out,
        rows,
        d,
        rows_a_block,
        tuple(x.stride()),
        ROWS=16,
        COLUMNS=columns,
        WEIGHT=weight is not None,
        SUMS=sums,
    )
    total = out.sum(1)
    return total if weight is not None and weight.dim() == 2 else total[0]


@entry
@triton.jit
def matvec_kernel(x, vector, out, rows, d, stride_x, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for k in range(0, d, COLUMNS):
        j = k + tl.arange(0, COLUMNS)
        place = r[:, None].to(tl.int64) * stride_x[0] + j[None, :].to(tl.int64) * stride_x[1]
        value = tl.load(x + place, mask=(r < rows)[:, None] & (j < d)[None, :], other=0).to(tl.float32)
        total += value * tl.load(vector + j, mask=j < d, other=0.0)[None, :]
    tl.store(out + r, tl.sum(total, 1), mask=r < rows)


def matvec(x: Tensor, vector: Tensor) -> Tensor:
    """x (R, D) times vector (D,) in fp32."""
    rows, d = x.shape
    out = torch.empty(rows, dtype=torch.float32, device=x.device)
    matvec_kernel[(cdiv(rows, 16),)](x, vector, out, rows, d, tuple(x.stride()), ROWS=16, COLUMNS=256)
    return out


def finish_bias(problem: Problem, terms: RowTerms, sums: Tensor | None) -> Tensor | None:
    """dbias, rounded once from the column sums (V,) of dZ, which it changes."""
    if sums is None or problem.bias is None:
        return None
    if terms.smooth_apart:
        total = terms.sigma.sum()
        sums -= total if problem.column_weight is None else problem.column_weight * total
    return torch.mul(sums, terms.scale).to(problem.bias.dtype)
