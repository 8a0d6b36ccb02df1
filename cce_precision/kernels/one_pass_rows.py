"""What the powers of one pass tell of each token, and what makes their products its gradient: a kernel a step, because
a call with few tokens or features is as slow as the host launches.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..problem import Problem
from .dz import block_rows, write_powers
from .entry import entry
from .launch import cdiv, next_power_of_2
from .primitives import exp, expm1, log1p, round_to, wide, widened
from .terms import RowTerms

__all__ = ["Rows", "fill_powers", "finish_rows", "plain_terms", "weighted_rows"]

_LARGEST_EXPONENT = 60.0  # e^60 times any vocabulary stays below the largest fp32
_ROWS, _TILES = 16, 64  # of the statistics that a program reads at once
_LEAST_COLUMNS = 4096  # of a vocabulary that is worth two more launches
_SAMPLED = 128  # one of so many columns, the first, tells what the odds are at least


class Rows(NamedTuple):
    """What the powers of some tokens tell of them, (T,) fp32 each; 0 where ignored."""

    nll: Tensor
    lse: Tensor
    label: Tensor  # P_t - 1
    factor: Tensor  # exp(r - lse)

    @staticmethod
    def empty(n: int, device: torch.device) -> Rows:
        return Rows(*(torch.empty(n, dtype=torch.float32, device=device) for _ in range(4)))

    def of(self, chunk: slice) -> Rows:
        return Rows(*(x[chunk] for x in self))


def plain_terms(targets: Tensor, rows: Tensor, label: Tensor, scale: Tensor, flushed: bool = False) -> RowTerms:
    """Terms that make dZ the powers relative to rows[0] of rows (6, T), whose other rows are 1, 0, 0, 0 and what the
    powers are flushed below, with the label apart.
    """
    return RowTerms(targets, rows, label, scale, False, False, False, False, flushed)


@entry
@triton.jit
def start_rows_kernel(
    e,  # (T, D) contiguous
    c,  # (V, D)
    targets,  # (T,), -1 where ignored
    target_logit,  # (T,) fp32, 0 where ignored
    terms,  # (6, T) fp32 of RowTerms
    n,
    d,
    stride_c,
    FEATURES: tl.constexpr,
):
    row = tl.program_id(0)
    target = tl.load(targets + row)
    total = tl.zeros((FEATURES,), tl.float32)
    if target >= 0:
        for k in range(0, d, FEATURES):
            j = k + tl.arange(0, FEATURES)
            left = tl.load(e + wide(d) * row + j, mask=j < d, other=0)
            right = tl.load(c + target * stride_c[0] + j.to(tl.int64) * stride_c[1], mask=j < d, other=0)
            total += widened(left) * widened(right)
    z_t = tl.sum(total, 0)
    tl.store(target_logit + row, z_t)
    field = tl.arange(0, 8)
    tl.store(terms + field * n + row, tl.where(field == 0, z_t, tl.where(field == 1, 1.0, 0.0)), mask=field < 6)


@entry
@triton.jit
def flushed_below_kernel(
    sums,  # (column tiles, T) fp32: of the powers of some columns
    terms,  # (6, T) fp32 of RowTerms, the last out
    n,
    tiles,
    below,
    ROWS: tl.constexpr,
    TILES: tl.constexpr,
):
    """Powers are flushed that are below `below` times the odds, which are at least those of some columns."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    odds = row_sums(sums, rows, n, tiles, ROWS, TILES)
    tl.store(terms + wide(n) * 5 + rows, odds * below, mask=rows < n)


@triton.jit
def row_sums(sums, rows, n, tiles, ROWS: tl.constexpr, TILES: tl.constexpr):
    """The sums (column tiles, T) over the column tiles, in an order that depends on their number alone."""
    total = tl.zeros((TILES, ROWS), tl.float32)
    for first in range(0, tiles, TILES):
        tile = first + tl.arange(0, TILES)
        inside = (tile < tiles)[:, None] & (rows < n)[None, :]
        total += tl.load(sums + tile[:, None].to(tl.int64) * n + rows[None, :], mask=inside, other=0.0)
    return tl.sum(total, 0)


@entry
@triton.jit
def restart_rows_kernel(
    maxima,  # (column tiles, T) fp32
    terms,  # (6, T) fp32 of RowTerms, the first, the reference, in and out
    again,  # (row blocks,) int32 zeros
    n,
    tiles,
    largest,
    HEIGHT: tl.constexpr,  # of a row block, a multiple of ROWS
    ROWS: tl.constexpr,
    TILES: tl.constexpr,
):
    """Rows whose largest logit is too far above their reference begin again from it, and with them their block. Nothing
    of them is flushed, whose sums may have overflowed.
    """
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    highest = tl.full((TILES, ROWS), float("-inf"), tl.float32)
    for first in range(0, tiles, TILES):
        tile = first + tl.arange(0, TILES)
        inside = (tile < tiles)[:, None] & (rows < n)[None, :]
        at = maxima + tile[:, None].to(tl.int64) * n + rows[None, :]
        highest = tl.maximum(highest, tl.load(at, mask=inside, other=float("-inf")))
    top = tl.max(highest, 0)
    known = tl.load(terms + rows, mask=rows < n, other=float("inf"))
    high = top - known > largest
    tl.store(terms + rows, top, mask=high)
    tl.store(terms + wide(n) * 5 + rows, 0.0, mask=high)
    some = tl.max(high.to(tl.int32), 0)
    if some > 0:
        tl.atomic_max(again + tl.program_id(0) * ROWS // HEIGHT, some)


@entry
@triton.jit
def heads_kernel(
    sums,  # (column tiles, T) fp32: of the powers
    reference,  # (T,) fp32
    target_logit,  # (T,) fp32
    targets,  # (T,)
    nll,
    lse,
    label,
    factor,  # (T,) fp32 each, see `Rows`
    n,
    tiles,
    ROWS: tl.constexpr,
    TILES: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    odds = row_sums(sums, rows, n, tiles, ROWS, TILES)
    r, z_t = tl.load(reference + rows, mask=rows < n, other=0.0), tl.load(target_logit + rows, mask=rows < n, other=0.0)
    counts = tl.load(targets + rows, mask=rows < n, other=-1) >= 0
    gap = tl.log(odds) + (r - z_t)  # log of the odds against the target
    moved = tl.maximum(gap, 0.0) + log1p(exp(-tl.abs(gap)))
    loss = tl.where(r == z_t, log1p(odds), moved)
    tl.store(nll + rows, tl.where(counts, loss, 0.0), mask=rows < n)
    tl.store(lse + rows, tl.where(counts, z_t + loss, 0.0), mask=rows < n)
    tl.store(label + rows, tl.where(counts, expm1(-loss), 0.0), mask=rows < n)
    tl.store(factor + rows, tl.where(counts, exp(r - z_t - loss), 0.0), mask=rows < n)


def fill_powers(problem: Problem, e: Tensor, targets: Tensor, powers: Tensor, found: Rows, below: float) -> None:
    """Fills the powers of the tokens e (T, D) contiguous, ignored ones 0, and what they tell of them. Those below
    `below` times the odds against the target may be 0; of the odds the first columns tell what they are at least.
    """
    n, c, device = e.shape[0], problem.c, e.device
    terms = torch.empty((6, n), dtype=torch.float32, device=device)
    z_t = torch.empty(n, dtype=torch.float32, device=device)
    features = min(1024, next_power_of_2(problem.d))
    start_rows_kernel[(n,)](e, c, targets, z_t, terms, n, problem.d, tuple(c.stride()), FEATURES=features)
    height, grid = block_rows(c), (cdiv(n, _ROWS),)
    flushed = below > 0 and problem.v >= _LEAST_COLUMNS
    if flushed:
        some = max(problem.v // _SAMPLED // 256, 1) * 256
        stats = write_powers(problem, e, c[:some], plain_terms(targets, terms, z_t, z_t), powers[:, :some], None, None)
        flushed_below_kernel[grid](stats[0], terms, n, stats.shape[1], below, ROWS=_ROWS, TILES=_TILES)
    plain = plain_terms(targets, terms, z_t, z_t, flushed)
    stats = write_powers(problem, e, c, plain, powers, None, None)
    tiles = stats.shape[1]
    again = torch.zeros(cdiv(n, height), dtype=torch.int32, device=device)
    restart_rows_kernel[grid](
        stats[1], terms, again, n, tiles, _LARGEST_EXPONENT, HEIGHT=height, ROWS=_ROWS, TILES=_TILES
    )
    write_powers(problem, e, c, plain, powers, again, stats)
    heads_kernel[grid](stats[0], terms, z_t, targets, *found, n, tiles, ROWS=_ROWS, TILES=_TILES)


@entry
@triton.jit
def weighted_rows_kernel(e, factor, out, d, FEATURES: tl.constexpr):
    row = tl.program_id(0)
    j = tl.program_id(1) * FEATURES + tl.arange(0, FEATURES)
    at = wide(d) * row + j
    value = tl.load(e + at, mask=j < d, other=0).to(tl.float32) * tl.load(factor + row)
    tl.store(out + at, round_to(value, out.dtype.element_ty), mask=j < d)


def weighted_rows(e: Tensor, factor: Tensor) -> Tensor:
    """e (T, D) contiguous times factor (T,) fp32, rounded once to the dtype of e."""
    n, d = e.shape
    out, features = torch.empty_like(e), min(1024, next_power_of_2(d))
    weighted_rows_kernel[(n, cdiv(d, features))](e, factor, out, d, FEATURES=features)
    return out


@entry
@triton.jit
def finish_rows_kernel(
    total,  # (N, D) fp32, in and out
    c,  # (V, D)
    targets,  # (N,), -1 where ignored
    factor,  # (N,) fp32 of the sums
    label,  # (N,) fp32 of c_t
    d,
    stride_c,
    FEATURES: tl.constexpr,
):
    row = tl.program_id(0)
    j = tl.program_id(1) * FEATURES + tl.arange(0, FEATURES)
    value = tl.zeros((FEATURES,), tl.float32)
    target = tl.load(targets + row)
    at = total + wide(d) * row + j
    if target >= 0:
        value = tl.load(at, mask=j < d, other=0.0) * tl.load(factor + row)
        c_t = tl.load(c + target * stride_c[0] + j.to(tl.int64) * stride_c[1], mask=j < d, other=0)
        value += tl.load(label + row) * c_t.to(tl.float32)
    tl.store(at, value, mask=j < d)


def finish_rows(problem: Problem, total: Tensor, chunk: slice, rows: Rows) -> None:
    """total (T, D) fp32 = the gradients of the chunk's tokens, from the products of their powers."""
    features, c = min(1024, next_power_of_2(problem.d)), problem.c
    finish_rows_kernel[(total.shape[0], cdiv(problem.d, features))](
        total, c, problem.targets[chunk], rows.factor, rows.label, problem.d, tuple(c.stride()), FEATURES=features
    )
