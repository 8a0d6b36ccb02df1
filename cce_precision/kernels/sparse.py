"""dZ as a sparse matrix: the logits of the hits alone, the entries that the filter keeps, and the two products.

`entries_of` gathers the tokens of each block of 16 columns, computes those logits again, and decides by the definition
with the final lse. dE adds the kept entries of each token to the target's term in fp32; dC multiplies each block's
entries, as a hi + lo pair of the inputs' dtype, with the gathered embeddings, adds the target's terms (three parts,
which is all of fp32) and rounds once. A long column is cut in batches and in features. One program owns each output
tile: no float atomics.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..problem import Problem
from ..promise import Seen, row_norms
from .elements import DTYPES, STOCHASTIC, ElementFilter, dz_entries
from .hits import BLOCK
from .launch import multiprocessors, precision_of
from .lists import BATCH, Lists
from .primitives import add_parts, cap, multiply_add, round_to, wide
from .terms import RowTerms, TokensByTarget, label_row

__all__ = ["Entries", "entries_of", "finish_blocks", "finish_rows", "seen_of"]


@triton.jit
def gather_kernel(
    e,  # (N, D) contiguous, ignored rows 0
    c,  # (V, D)
    bias,  # (V,) or unused
    targets,  # (N,) int64
    rows_terms,  # (6, N) fp32
    tokens,  # (capacity,) int32
    starts,  # (blocks + 1,) int32
    units,  # (blocks + 1,) int32
    unit_block,  # int32
    values,  # (capacity, WIDTH) fp32, out
    row_counts,  # (N,) int32: kept entries, in and out
    seed,  # () int64
    blocks,
    shape,  # (N, V, D, number of the first column in the whole vocabulary)
    stride_c,
    scalars,  # (softcap, temperature, eps)
    M: tl.constexpr,
    WIDTH: tl.constexpr,
    K: tl.constexpr,
    FLAGS: tl.constexpr,  # (bias, softcap, entropy, kind of the filter)
    PRECISION: tl.constexpr,
):
    n, v, d, first_id = shape
    softcap, temperature, eps = scalars
    for unit in range(tl.program_id(0), tl.load(units + blocks), tl.num_programs(0)):
        block = tl.load(unit_block + unit)
        slots = tl.load(starts + block) + (unit - tl.load(units + block)) * M + tl.arange(0, M)
        inside = slots < tl.load(starts + block + 1)
        rows = tl.load(tokens + slots, mask=inside, other=0)
        columns = block * WIDTH + tl.arange(0, WIDTH)
        acc = tl.zeros((M, WIDTH), tl.float32)
        for k in range(0, d, K):
            j = k + tl.arange(0, K)
            at = rows[:, None].to(tl.int64) * d + j[None, :]
            left = tl.load(e + at, mask=inside[:, None] & (j < d)[None, :], other=0)
            at = columns[:, None].to(tl.int64) * stride_c[0] + j[None, :].to(tl.int64) * stride_c[1]
            right = tl.load(c + at, mask=(columns < v)[:, None] & (j < d)[None, :], other=0)
            acc = multiply_add(left, right.T, acc, PRECISION)
        if FLAGS[0]:
            acc += tl.load(bias + columns, mask=columns < v, other=0).to(tl.float32)[None, :]
        z, slope = cap(acc, softcap, FLAGS[1])
        own = columns[None, :] == tl.load(targets + rows, mask=inside, other=-1).to(tl.int32)[:, None]
        own = own | (columns >= v)[None, :]
        x = dz_entries(
            z,
            slope,
            rows,
            inside,
            own,
            first_id + columns,
            columns,
            columns < v,
            rows_terms,
            n,
            rows_terms,
            seed,
            temperature,
            eps,
            FLAGS[2],
            FLAGS[3],
            False,
        )
        at = slots[:, None].to(tl.int64) * WIDTH + tl.arange(0, WIDTH)[None, :]
        tl.store(values + at, x, mask=inside[:, None])
        tl.atomic_add(row_counts + rows, tl.sum((x != 0).to(tl.int32), 1), mask=inside)


@triton.jit
def rows_kernel(
    values,  # (capacity, WIDTH) fp32 by slot
    tokens,  # (capacity,) int32 by slot
    starts,  # (blocks + 1,) int32
    blocks,  # (capacity,) int32 by token
    row_starts,  # (N + 1,) int32 hits of each token
    entry_starts,  # (N + 1,) int32 kept entries of each token
    columns,  # (capacity of entries,) int32, out
    weights,  # (capacity of entries,) fp32, out
    fits,
    steps,
    HITS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """The kept entries of one token, by column."""
    if tl.load(fits) != 0:
        row = tl.program_id(0)
        place = tl.load(entry_starts + row)
        last = tl.load(row_starts + row + 1)
        for first in range(tl.load(row_starts + row), last, HITS):
            hit = first + tl.arange(0, HITS)
            block = tl.load(blocks + hit, mask=hit < last, other=0)
            low, high = tl.load(starts + block), tl.load(starts + block + 1)
            for _ in range(steps):  # the slot of this token among the block's, which rise
                middle = (low + high) // 2
                less = tl.load(tokens + middle, mask=low < high, other=0) < row
                high = tl.where(less | (low >= high), high, middle)
                low = tl.where(less & (low < high), middle + 1, low)
            at = low[:, None].to(tl.int64) * WIDTH + tl.arange(0, WIDTH)[None, :]
            x = tl.load(values + at, mask=(hit < last)[:, None], other=0.0)
            column = tl.reshape(block[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :], (HITS * WIDTH,))
            x = tl.reshape(x, (HITS * WIDTH,))
            kept = (x != 0).to(tl.int32)
            to = place + tl.cumsum(kept, 0) - 1
            tl.store(columns + to, column, mask=kept != 0)
            tl.store(weights + to, x, mask=kept != 0)
            place += tl.sum(kept, 0)


@dataclass(frozen=True)
class Entries:
    """The kept entries, by block of columns and by token."""

    lists: Lists
    values: Tensor  # (capacity, BLOCK) fp32: x by slot, 0 where nothing is kept
    starts: Tensor  # (N + 1,) int32: entries of token i are starts[i] to starts[i + 1]
    columns: Tensor  # (capacity of entries,) int32
    weights: Tensor  # (capacity of entries,) fp32
    dense: Tensor  # () int32: 1 where a capacity did not hold them, and nothing here counts


def entries_of(
    problem: Problem,
    e: Tensor,
    terms: RowTerms,
    filt: ElementFilter,
    lists: Lists,
    values: Tensor,
    columns: Tensor,
    weights: Tensor,
) -> Entries:
    """The entries that the filter keeps among the hits; fills the buffers `values`, `columns` and `weights`."""
    n, v, c, bias = problem.n, problem.v, problem.c, problem.bias
    cuda = e.device.type == "cuda"
    blocks = lists.starts.numel() - 1
    counts = torch.zeros(n, dtype=torch.int32, device=e.device)
    depth = 64 if e.element_size() == 2 else 16
    gather_kernel[(8 * multiprocessors(e.device),)](
        e,
        c,
        terms.terms if bias is None else bias,
        terms.targets,
        terms.terms,
        lists.tokens,
        lists.starts,
        lists.units,
        lists.unit_block,
        values,
        counts,
        filt.seed,
        blocks,
        (n, v, problem.d, problem.first_column),
        tuple(c.stride()),
        (float(problem.softcap or 1.0), float(problem.temperature), filt.eps),
        M=BATCH,
        WIDTH=BLOCK,
        K=depth if cuda else 16,
        FLAGS=(bias is not None, problem.softcap is not None, terms.entropy, filt.kind),
        PRECISION=precision_of(c),
        num_warps=4,
        num_stages=4,
    )
    starts = torch.zeros(n + 1, dtype=torch.int32, device=e.device)
    torch.cumsum(counts, 0, dtype=torch.int32, out=starts[1:])
    fits = lists.fits * (starts[-1] <= columns.numel())
    rows_kernel[(n,)](
        values,
        lists.tokens,
        lists.starts,
        lists.blocks,
        lists.row_starts,
        starts,
        columns,
        weights,
        fits,
        n.bit_length(),
        HITS=32,
        WIDTH=BLOCK,
        num_warps=1,
    )
    return Entries(lists, values, starts, columns, weights, 1 - fits)


@triton.jit
def finish_rows_kernel(
    out,  # (N, D) gradient
    base,  # (N, D) fp32 sums to begin with, or unused
    c,  # (V, D)
    targets,  # (N,) int64
    label,  # (N,) fp32
    sigma,  # (N,) fp32
    shift,  # (D,) fp32 or unused
    scale,  # () fp32
    starts,  # (N + 1,) int32
    columns,  # int32
    weights,  # fp32
    dense,  # () int32
    v,
    d,
    stride_c,
    ENTRIES: tl.constexpr,
    FEATURES: tl.constexpr,
    FLAGS: tl.constexpr,  # (base, shift)
):
    if tl.load(dense) == 0:
        row = tl.program_id(0)
        j = tl.program_id(1) * FEATURES + tl.arange(0, FEATURES)
        first, last = tl.load(starts + row), tl.load(starts + row + 1)
        acc = tl.zeros((ENTRIES, FEATURES), tl.float32)
        for i in range(first, last, ENTRIES):
            entry = i + tl.arange(0, ENTRIES)
            column = tl.load(columns + entry, mask=entry < last, other=0)
            x = tl.load(weights + entry, mask=entry < last, other=0.0)
            at = column[:, None].to(tl.int64) * stride_c[0] + j[None, :].to(tl.int64) * stride_c[1]
            value = tl.load(c + at, mask=(entry < last)[:, None] & (j < d)[None, :], other=0)
            acc += x[:, None] * value.to(tl.float32)
        if FLAGS[0]:
            total = tl.load(base + wide(d) * row + j, mask=j < d, other=0.0)
        else:
            total = label_row(c, targets, label, sigma, shift, row, j, v, d, stride_c, True, FLAGS[1])
        total = (total + tl.sum(acc, 0)) * tl.load(scale)
        tl.store(out + wide(d) * row + j, round_to(total, out.dtype.element_ty), mask=j < d)


def finish_rows(
    problem: Problem,
    terms: RowTerms,
    entries: Entries,
    out: Tensor,  # (N, D) contiguous
    base: Tensor | None,  # (N, D) fp32
    shift: Tensor | None,  # (D,) fp32, where there is no base
) -> None:
    """dE: the kept entries times the classifier's rows, and `base` or the target's terms minus sigma x shift, scaled
    and rounded once. Not done where entries.dense is 1.
    """
    features = min(512, max(16, triton.next_power_of_2(problem.d)))
    finish_rows_kernel[(problem.n, triton.cdiv(problem.d, features))](
        out,
        terms.terms if base is None else base,
        problem.c,
        problem.targets,
        terms.label,
        terms.sigma,
        terms.terms if shift is None else shift,
        terms.scale,
        entries.starts,
        entries.columns,
        entries.weights,
        entries.dense,
        problem.v,
        problem.d,
        tuple(problem.c.stride()),
        ENTRIES=8,
        FEATURES=features,
        FLAGS=(base is not None, shift is not None),
        num_warps=4,
        num_stages=3,
    )


@triton.jit
def seen_kernel(starts, columns, weights, alpha, norms, out, n, drawn, ENTRIES: tl.constexpr):
    row = tl.program_id(0)
    unit = tl.load(alpha + row)
    most = tl.abs(unit) * drawn
    last = tl.load(starts + row + 1)
    mass = tl.zeros((ENTRIES,), tl.float32)
    squares = tl.zeros((ENTRIES,), tl.float32)
    energy = tl.zeros((ENTRIES,), tl.float32)
    for i in range(tl.load(starts + row), last, ENTRIES):
        entry = i + tl.arange(0, ENTRIES)
        x = tl.load(weights + entry, mask=entry < last, other=0.0)
        norm = tl.load(norms + tl.load(columns + entry, mask=entry < last, other=0))
        below = tl.abs(x) <= most
        mass += tl.where(below, 0.0, x)
        square = tl.where(below, x * x, 0.0)
        squares += square
        energy += square * norm * norm
    total = tl.sum(mass, 0)
    tl.store(out + row, tl.where(total == 0.0, 0.0, total / unit))
    tl.store(out + n + row, tl.sum(squares, 0))
    tl.store(out + 2 * n + row, tl.sum(energy, 0))


def seen_of(problem: Problem, terms: RowTerms, entries: Entries, filt: ElementFilter, nll: Tensor) -> Seen:
    """What the kept entries tell of their filter, without entropy. Meaningless where entries.dense is 1.

    A softcap's slope stands in the entries: the mass above eps is then at least what is given, and an entry above eps
    may count as drawn, so that the promise is the weaker.
    """
    n = problem.n
    out = torch.empty((3, n), dtype=torch.float32, device=nll.device)
    norms = row_norms(problem)
    drawn = filt.eps * (1 + 2.0**-20) if filt.kind == STOCHASTIC else 0.0
    alpha = terms.terms[1]
    seen_kernel[(n,)](
        entries.starts, entries.columns, entries.weights, alpha, norms[1], out, n, drawn, ENTRIES=64, num_warps=1
    )
    return Seen(alpha, out[0] + torch.exp(-nll), out[2].sum(), (out[1] * norms[0].square()).sum(), norms)


@triton.jit
def finish_blocks_kernel(
    out,  # (V, D) gradient
    bias_sums,  # (V,) fp32 column sums of dZ, or unused
    base,  # (W, D) fp32 sums of the columns from `first` on, or unused
    e,  # (N, D) contiguous
    targets,  # (N,) int64
    label,  # (N,) fp32
    by_target,  # (N,) int64 tokens sorted by target
    target_starts,  # (V + 1,) int32
    values,  # (capacity, WIDTH) fp32
    tokens,  # (capacity,) int32
    starts,  # (blocks + 1,) int32
    dense,  # () int32
    weight,  # (V,) fp32 or unused
    shift,  # (D,) fp32 or unused
    scale,  # () fp32
    first,  # the first block
    shape,  # (V, D)
    M: tl.constexpr,
    WIDTH: tl.constexpr,
    FEATURES: tl.constexpr,
    FLAGS: tl.constexpr,  # (gradient, bias sums, base, shift, weight)
    PARTS: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    v, d = shape
    if tl.load(dense) == 0:
        block = first + tl.program_id(0)
        features = tl.program_id(1) * FEATURES + tl.arange(0, FEATURES)
        columns = block * WIDTH + tl.arange(0, WIDTH)
        mask = (features < d)[:, None] & (columns < v)[None, :]
        acc = tl.zeros((FEATURES, WIDTH), tl.float32)
        sums = tl.zeros((WIDTH,), tl.float32)
        begin, end = tl.load(starts + block), tl.load(starts + block + 1)
        for i in range(begin, end, M):
            slot = i + tl.arange(0, M)
            token = tl.load(tokens + slot, mask=slot < end, other=0)
            at = slot[:, None].to(tl.int64) * WIDTH + tl.arange(0, WIDTH)[None, :]
            x = tl.load(values + at, mask=(slot < end)[:, None], other=0.0)
            if FLAGS[0]:
                at = token[:, None].to(tl.int64) * d + features[None, :]
                rows = tl.load(e + at, mask=(slot < end)[:, None] & (features < d)[None, :], other=0)
                acc = add_parts(acc, rows.T, x, False, DTYPE, 2 if PARTS > 1 else 1, PRECISION)
            if FLAGS[1]:
                sums += tl.sum(x, 0)
        begin = tl.load(target_starts + tl.minimum(block * WIDTH, v))
        end = tl.load(target_starts + tl.minimum(block * WIDTH + WIDTH, v))
        for i in range(begin, end, 16):
            place = i + tl.arange(0, 16)
            token = tl.load(by_target + place, mask=place < end, other=0)
            own = tl.load(targets + token, mask=place < end, other=-1).to(tl.int32)[:, None] == columns[None, :]
            x = tl.where(own, tl.load(label + token, mask=place < end, other=0.0)[:, None], 0.0)
            if FLAGS[0]:
                at = token[:, None] * d + features[None, :]
                rows = tl.load(e + at, mask=(place < end)[:, None] & (features < d)[None, :], other=0)
                acc = add_parts(acc, rows.T, x, False, DTYPE, PARTS, PRECISION)
            if FLAGS[1]:
                sums += tl.sum(x, 0)
        if FLAGS[0]:
            if FLAGS[2]:
                at = (columns - first * WIDTH)[None, :].to(tl.int64) * d + features[:, None]
                acc += tl.load(base + at, mask=mask, other=0.0)
            if FLAGS[3]:
                w = tl.full((WIDTH,), 1.0, tl.float32)
                if FLAGS[4]:
                    w = tl.load(weight + columns, mask=columns < v, other=0.0)
                acc -= w[None, :] * tl.load(shift + features, mask=features < d, other=0.0)[:, None]
            value = round_to(acc * tl.load(scale), out.dtype.element_ty)
            tl.store(out + columns[None, :].to(tl.int64) * d + features[:, None], value, mask=mask)
        if FLAGS[1]:  # noqa: SIM102
            if tl.program_id(1) == 0:
                tl.store(bias_sums + columns, sums, mask=columns < v)


def finish_blocks(
    problem: Problem,
    e: Tensor,
    terms: RowTerms,
    segments: TokensByTarget,
    entries: Entries,
    d_c: Tensor | None,  # (V, D)
    bias_sums: Tensor | None,  # (V,) fp32
    shift: Tensor | None,  # (D,) fp32
    run: tuple[int, int] | None = None,  # first column, a multiple of 16, and one past the last; all by default
    base: Tensor | None = None,  # (W, D) fp32 sums of the run
) -> None:
    """Rows of dC: kept entries, the target's terms and `base`, minus weight x shift, scaled and rounded once; and the
    column sums of the entries and the targets' terms. Not done where entries.dense is 1.
    """
    v, d, weight = problem.v, problem.d, problem.column_weight
    start, stop = (0, v) if run is None else run
    features = min(512 // e.element_size(), max(16, triton.next_power_of_2(d)))
    finish_blocks_kernel[(triton.cdiv(stop - start, BLOCK), triton.cdiv(d, features) if d_c is not None else 1)](
        terms.terms if d_c is None else d_c,
        terms.terms if bias_sums is None else bias_sums,
        terms.terms if base is None else base,
        e,
        terms.targets,
        terms.label,
        segments.tokens,
        segments.starts,
        entries.values,
        entries.lists.tokens,
        entries.lists.starts,
        entries.dense,
        terms.terms if weight is None else weight,
        terms.terms if shift is None else shift,
        terms.scale,
        start // BLOCK,
        (v, d),
        M=32,
        WIDTH=BLOCK,
        FEATURES=features,
        FLAGS=tuple(x is not None for x in (d_c, bias_sums, base, shift, weight)),
        PARTS=3 if e.dtype is not torch.float32 else 1,
        DTYPE=DTYPES[e.dtype],
        PRECISION=precision_of(e),
        num_warps=4,
        num_stages=3,
    )
