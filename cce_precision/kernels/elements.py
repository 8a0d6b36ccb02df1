"""Element filters in the kernels: what becomes of each probability, by the definition of eager/filters.py, and dZ of a
run of columns under it.

The operand is a hi + lo pair of the inputs' dtype, off from x by 2^-17 relative (bf16) or 2^-22 (fp16, beside 2^-25
absolute); fp32 inputs take x as it is.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..numerics import Filter, FilterKind
from ..problem import Problem
from .dz import store_tile
from .entry import entry
from .heads import operand
from .launch import cdiv, config_for, descriptor_fits, multiprocessors, precision_of
from .primitives import (
    DRAWN,
    INTERPRETED,
    LOG2E,
    cap,
    column_word,
    grouped,
    hash32,
    load_tile,
    multiply_add,
    round_to,
    row_word,
    stirred,
    wide,
)
from .terms import RowTerms

__all__ = [
    "DROP", "STOCHASTIC", "ElementFilter", "groups_of", "member_of", "members_drawn", "sampled", "seed_words",
    "write_filtered",
]  # fmt: skip

# What becomes of an entry below the threshold.
NONE = 0  # it stays
DROP = 1
STOCHASTIC = 2  # it is drawn
COLUMNS = 3  # it is multiplied by its column's factor: the share where the column was drawn, else 0
ROWS = 4  # the same by its row's factor
DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


@triton.jit
def seed_words(seed):
    """The low and the high word of the 64-bit seed behind a pointer."""
    value = tl.load(seed)
    return (value & 0xFFFFFFFF).to(tl.uint32), ((value >> 32) & 0xFFFFFFFF).to(tl.uint32)


@triton.jit
def threshold(eps, rows, columns, low, high):
    """eps times a uniform draw in (0, 1] for each (row, column); rows and columns int32, broadcast.

    The words are those of hash32.
    """
    by_row = row_word(low, high, rows.to(tl.uint32))
    by_column = column_word(columns.to(tl.uint32))
    if INTERPRETED:
        return eps * ((stirred(by_row ^ by_column).to(tl.float32) + 0.5) * 2.3283064365386963e-10)
    else:
        u = tl.inline_asm_elementwise(
            DRAWN
            + """
            cvt.rn.f32.u32 u, word;
            add.rn.f32 u, u, 0f3F000000;
            mul.rn.f32 $0, u, 0f2F800000;
            }""",
            "=f,r,r",
            [by_row, by_column],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )
        return eps * u


@triton.jit
def sampled(p, rows, columns, eps, seed, factor, KIND: tl.constexpr, TAIL: tl.constexpr):
    """P^ of probabilities p (R, C), or of the tail alone: only what is below eps.

    rows (R, 1) and columns (1, C) int32 are what the draws are functions of, `factor` broadcasts over p, `seed` points
    to 64 bits. NaN is not below eps.
    """
    small = p < eps
    if KIND == 1:
        below = 0.0
    elif KIND == 2:
        low, high = seed_words(seed)
        below = tl.where((p >= threshold(eps, rows, columns, low, high)) & (p > 0), eps, 0.0)
    else:
        below = p * factor
    if TAIL:
        return tl.where(small, below, 0.0)
    else:
        return tl.where(small, below, p)


@triton.jit
def member_of(seed, index, share, first, count, OVER_COLUMNS: tl.constexpr):
    """The place that group `index` draws, see members_drawn."""
    low, high = seed_words(seed)
    size = wide(share).to(tl.uint32)
    group = (wide(first) // share + index).to(tl.uint32)
    column = (tl.zeros((), tl.int64) - (1 if OVER_COLUMNS else 2)).to(tl.uint32)
    drawn = hash32(low, high, group, column) % size
    place = group.to(tl.int64) * share + drawn.to(tl.int64) - first
    return tl.where((place >= 0) & (place < count), place, -1)


@entry
@triton.jit
def members_kernel(seed, out, groups, share, count, first, OVER_COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + index, member_of(seed, index, share, first, count, OVER_COLUMNS), mask=index < groups)


def groups_of(count: int, share: int, first: int) -> int:
    """How many groups of `share` neighbours the places first to first + count lie in."""
    return (first + count - 1) // share - first // share + 1


def members_drawn(seed: Tensor, count: int, share: int, first: int, over_columns: bool) -> Tensor:
    """The member drawn of each group of `share` neighbours among the places first to first + count, less `first`.

    (groups,) int64, rising; -1 where it lies before or past them, in a first or last group that is not whole.
    """
    groups, block = groups_of(count, share, first), 256
    out = torch.empty(groups, dtype=torch.int64, device=seed.device)
    members_kernel[(cdiv(groups, block),)](
        seed, out, groups, share, count, first, OVER_COLUMNS=over_columns, BLOCK=block
    )
    return out


@dataclass(frozen=True)
class ElementFilter:
    """An element filter of one side as a kernel takes it."""

    kind: int
    eps: float
    seed: Tensor  # 0-dim int64
    factor: Tensor | None = None  # (V,) or (N,) fp32: of entries below eps, by column or by row
    tail: bool = False  # the entries below eps alone

    @staticmethod
    def of(filt: Filter, dtype: torch.dtype, seed: Tensor) -> ElementFilter:
        """DROP or STOCHASTIC, or of a SUBSET filter what it does not sample: its entries above eps."""
        kind = {FilterKind.NONE: NONE, FilterKind.STOCHASTIC: STOCHASTIC}.get(filt.kind, DROP)
        return ElementFilter(kind, filt.threshold(dtype), seed)


@entry
@triton.jit
def filtered_kernel(
    e,  # (N, D) descriptor or pointer, ignored rows 0
    c,  # (W, D) descriptor or pointer, this run of columns
    bias,  # (W,) or unused
    targets,  # (N,) int64 columns, -1 where ignored
    rows_terms,  # (6, N) fp32, see terms.RowTerms
    label,  # (N,) fp32: the label's entry of dZ, which stays out of the operand
    high,  # (N, W): descriptor or pointer
    low,  # (N, W) what rounding lost, or unused
    column_sums,  # (row blocks, W) fp32 sums of the unrounded dZ, the label included, or unused
    row_sums,  # (column tiles, N) fp32 sums of the rounded dZ, or unused
    factor,  # (W,) or (N,) fp32 of the filter, or unused
    active,  # () int32: 0 where nothing is to be done; or unused
    seed,  # () int64
    shape,  # (N, W, D, first column among these targets', the same in the whole vocabulary)
    stride_e,
    stride_c,
    stride_dz,
    scalars,  # (softcap, temperature, eps)
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    GROUP: tl.constexpr,
    FLATTEN: tl.constexpr,
    FLAGS: tl.constexpr,  # (bias, softcap, entropy, low, column sums, kind of the filter, tail, active, row sums)
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
    DTYPE: tl.constexpr,
):
    n, width, d, start, first_id = shape
    softcap, temperature, eps = scalars
    blocks, tiles = tl.cdiv(n, M), tl.cdiv(width, N)
    units = blocks * tiles
    if FLAGS[7]:
        units = tl.where(tl.load(active) != 0, units, 0)
    for unit in tl.range(tl.program_id(0), units, tl.num_programs(0), flatten=FLATTEN):
        block, tile = grouped(unit, blocks, tiles, GROUP)
        acc = tl.zeros((M, N), tl.float32)
        for k in range(0, d, K):
            left = load_tile(e, stride_e, block * M, k, n, d, M, K, TMA)
            right = load_tile(c, stride_c, tile * N, k, width, d, N, K, TMA)
            acc = multiply_add(left, right.T, acc, PRECISION)
        rows = block * M + tl.arange(0, M)
        inside = rows < n
        columns = tile * N + tl.arange(0, N)
        if FLAGS[0]:
            acc += tl.load(bias + columns, mask=columns < width, other=0).to(tl.float32)[None, :]
        z, slope = cap(acc, softcap, FLAGS[1])
        local = tl.load(targets + rows, mask=inside, other=-1).to(tl.int32) - start - tile * N
        x = dz_entries(
            z,
            slope,
            rows,
            inside,
            tl.arange(0, N)[None, :] == local[:, None],
            first_id + columns,
            columns,
            columns < width,
            rows_terms,
            n,
            factor,
            seed,
            temperature,
            eps,
            FLAGS[2],
            FLAGS[5],
            FLAGS[6],
        )
        if FLAGS[4]:
            own = tl.arange(0, N)[None, :] == local[:, None]
            at_label = tl.load(label + rows, mask=inside, other=0.0)[:, None]
            total = tl.sum(tl.where(own, at_label, tl.where(inside[:, None], x, 0.0)), 0)
            tl.store(column_sums + wide(width) * block + columns, total, mask=columns < width)
        rounded = round_to(x, DTYPE)
        if FLAGS[8]:
            known = tl.where((columns < width)[None, :], rounded.to(tl.float32), 0.0)
            tl.store(row_sums + wide(n) * tile + rows, tl.sum(known, 1), mask=inside)
        store_tile(high, stride_dz, block * M, tile * N, n, width, rounded, M, N, TMA)
        if FLAGS[3]:
            lost = round_to(x - rounded.to(tl.float32), DTYPE)
            store_tile(low, stride_dz, block * M, tile * N, n, width, lost, M, N, TMA)


@triton.jit
def dz_entries(
    z,  # (R, C) capped logits before the temperature
    slope,  # (R, C) of the softcap, or 1
    rows,  # (R,) int32
    inside,  # (R,)
    own,  # (R, C) the target's entries, which become 0
    ids,  # (C,) numbers of the columns in the whole vocabulary
    places,  # (C,) where the columns' factors stand
    known,  # (C,) which columns there are
    rows_terms,
    n,
    factor,
    seed,
    temperature,
    eps,
    ENTROPY: tl.constexpr,
    KIND: tl.constexpr,
    TAIL: tl.constexpr,
):
    """x = P^ (alpha - kappa (log P + H)) slope; of a tail 0 in ignored rows, whose logits may be NaN."""
    lse = tl.load(rows_terms + rows, mask=inside, other=float("inf"))
    scale = tl.load(rows_terms + wide(n) + rows, mask=inside, other=0.0)[:, None]
    log_p = z * (1.0 / temperature) - lse[:, None]
    x = tl.where(own, 0.0, tl.exp2(log_p * LOG2E))
    if KIND > 0:
        weight = 0.0
        if KIND == 3:
            weight = tl.load(factor + places, mask=known, other=0.0)[None, :]
        if KIND == 4:
            weight = tl.load(factor + rows, mask=inside, other=0.0)[:, None]
        x = sampled(x, rows[:, None], ids[None, :], eps, seed, weight, KIND, TAIL)
    if ENTROPY:
        kappa = tl.load(rows_terms + wide(n) * 2 + rows, mask=inside, other=0.0)
        entropy = tl.load(rows_terms + wide(n) * 3 + rows, mask=inside, other=0.0)
        scale = scale - kappa[:, None] * (tl.maximum(log_p, -1024.0) + entropy[:, None])
    x = x * scale * slope
    if TAIL:
        x = tl.where((lse == float("inf"))[:, None], 0.0, x)
    return x


def write_filtered(
    problem: Problem,
    e: Tensor,  # (N, D) contiguous, ignored rows 0
    c: Tensor,  # (W, D)
    bias: Tensor | None,  # (W,)
    start: int,  # the number of the first column, as targets count
    terms: RowTerms,
    filt: ElementFilter,
    high: Tensor,  # (N, W)
    low: Tensor | None,  # (N, W)
    want_sums: bool = False,
    active: Tensor | None = None,  # () int32: 0 where nothing is to be done
    row_sums: Tensor | None = None,  # (N,) fp32: += the sums of the rows of high
) -> Tensor | None:
    """Fills high (and low) with dZ under an element filter, without the label. Returns (row blocks, W) column sums of
    the unrounded dZ with the label, if wanted.
    """
    rows, width = e.shape[0], c.shape[0]
    config = config_for("dz", c)
    blocks = cdiv(rows, config.m)
    by_tile = None if row_sums is None else row_sums.new_zeros(cdiv(width, config.n), rows)
    sums = torch.empty((blocks, width), dtype=torch.float32, device=e.device) if want_sums else None
    tma = descriptor_fits(e) and descriptor_fits(c) and descriptor_fits(high)
    unused = terms.terms
    put = lambda x: operand(high if x is None else x, [config.m, config.n], tma)  # noqa: E731
    filtered_kernel[(min(blocks * cdiv(width, config.n), multiprocessors(e.device)),)](
        operand(e, [config.m, config.k], tma),
        operand(c, [config.n, config.k], tma),
        unused if bias is None else bias,
        terms.targets,
        terms.terms,
        terms.label,
        put(high),
        put(low),
        unused if sums is None else sums,
        unused if by_tile is None else by_tile,
        unused if filt.factor is None else filt.factor,
        unused if active is None else active,
        filt.seed,
        (rows, width, problem.d, start, problem.first_column + start),
        tuple(e.stride()),
        tuple(c.stride()),
        tuple(high.stride()),
        (float(problem.softcap or 1.0), float(problem.temperature), filt.eps),
        M=config.m,
        N=config.n,
        K=config.k,
        GROUP=config.group,
        FLATTEN=config.flatten and filt.kind != STOCHASTIC,  # whose epilogue leaves no registers for it
        FLAGS=(
            bias is not None,
            problem.softcap is not None,
            terms.entropy,
            low is not None,
            want_sums,
            filt.kind,
            filt.tail,
            active is not None,
            by_tile is not None,
        ),
        TMA=tma,
        PRECISION=precision_of(c),
        DTYPE=DTYPES[high.dtype],
        num_warps=config.warps,
        num_stages=config.stages,
    )
    if row_sums is not None and by_tile is not None:
        row_sums += by_tile.sum(0)
    return sums
