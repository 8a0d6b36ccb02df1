"""The two products of dZ as a sparse matrix (entries.py).

dE adds the kept entries of each token to the target's term in fp32; dC multiplies each block's entries, as a hi + lo
pair of the inputs' dtype, with the gathered embeddings, adds the target's terms (three parts, which is all of fp32) and
rounds once. A long column is cut in batches and in features. One program owns each output tile: no float atomics.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..problem import Problem
from .elements import DTYPES
from .entries import Entries, hit_values
from .entry import entry
from .hits import BLOCK
from .launch import Config, cdiv, next_power_of_2, precision_of
from .primitives import add_parts, round_to, wide
from .terms import RowTerms, TokensByTarget, label_row

__all__ = ["finish_blocks", "finish_rows"]

BLOCKS = Config(32, 256, BLOCK, 4, 3)  # tokens and 16-bit features of dC's products; of 32-bit features half as many


@entry
@triton.jit
def finish_rows_kernel(
    out,  # (N, D) gradient
    base,  # (N, D) fp32 sums to begin with, or unused
    c,  # (V, D)
    targets,  # (N,) int64
    label,  # (N,) fp32
    sigma,  # (N,) fp32
    shift,  # (D,) fp32 or unused
    centre,  # (2, D) fp32 of even and odd tokens, see numerics.Variant; or unused
    terms,  # (6, N) fp32 of RowTerms
    excess,  # (N,) fp32 sums of what `base` holds beside the labels, or unused
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
    FLAGS: tl.constexpr,  # (base, shift, centre, excess)
):
    if tl.load(dense) == 0:
        row = tl.program_id(0)
        j = tl.program_id(1) * FEATURES + tl.arange(0, FEATURES)
        first, last = tl.load(starts + row), tl.load(starts + row + 1)
        acc = tl.zeros((ENTRIES, FEATURES), tl.float32)
        mass = tl.zeros((ENTRIES,), tl.float32)
        for i in range(first, last, ENTRIES):
            entry = i + tl.arange(0, ENTRIES)
            column = tl.load(columns + entry, mask=entry < last, other=0)
            x = tl.load(weights + entry, mask=entry < last, other=0.0)
            at = column[:, None].to(tl.int64) * stride_c[0] + j[None, :].to(tl.int64) * stride_c[1]
            value = tl.load(c + at, mask=(entry < last)[:, None] & (j < d)[None, :], other=0)
            acc += x[:, None] * value.to(tl.float32)
            mass += x
        if FLAGS[0]:
            total = tl.load(base + wide(d) * row + j, mask=j < d, other=0.0)
        else:
            total = label_row(c, targets, label, sigma, shift, row, j, v, d, stride_c, True, FLAGS[1])
        total += tl.sum(acc, 0)
        if FLAGS[2]:
            surplus = tl.sum(mass, 0) + tl.load(label + row)
            surplus -= tl.load(terms + wide(tl.num_programs(0)) * 5 + row)  # alpha - beta, what a row of dZ sums to
            if FLAGS[3]:
                surplus += tl.load(excess + row)
            total -= surplus * tl.load(centre + row % 2 * d + j, mask=j < d, other=0.0)
        total *= tl.load(scale)
        tl.store(out + wide(d) * row + j, round_to(total, out.dtype.element_ty), mask=j < d)


def finish_rows(
    problem: Problem,
    terms: RowTerms,
    entries: Entries,
    out: Tensor,  # (N, D) contiguous
    base: Tensor | None,  # (N, D) fp32
    shift: Tensor | None,  # (D,) fp32, where there is no base
    centre: Tensor | None,  # (2, D) fp32
    excess: Tensor | None,  # (N,) fp32 row sums of what `base` holds beside the labels
) -> None:
    """dE: the kept entries times the classifier's rows, and `base` or the target's terms minus sigma x shift, minus
    the token's centre times what the entries, the label and the excess sum to beyond alpha - beta, scaled and rounded
    once. Not done where entries.dense is 1.
    """
    features = min(512, max(16, next_power_of_2(problem.d)))
    finish_rows_kernel[(problem.n, cdiv(problem.d, features))](
        out,
        terms.terms if base is None else base,
        problem.c,
        problem.targets,
        terms.label,
        terms.sigma,
        terms.terms if shift is None else shift,
        terms.terms if centre is None else centre,
        terms.terms,
        terms.terms if excess is None else excess,
        terms.scale,
        entries.starts,
        entries.buffers.columns,
        entries.buffers.weights,
        entries.dense,
        problem.v,
        problem.d,
        tuple(problem.c.stride()),
        ENTRIES=8,
        FEATURES=features,
        FLAGS=(base is not None, shift is not None, centre is not None, excess is not None),
        num_warps=4,
        num_stages=3,
    )


@entry
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
    masks,  # (capacity,) int16
    offsets,  # (capacity,) int32
    values,  # (capacity of entries,) fp32
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
        mask = (columns < v)[:, None] & (features < d)[None, :]
        acc = tl.zeros((WIDTH, FEATURES), tl.float32)
        sums = tl.zeros((WIDTH,), tl.float32)
        begin, end = tl.load(starts + block), tl.load(starts + block + 1)
        for i in range(begin, end, M):
            slot = i + tl.arange(0, M)
            token = tl.load(tokens + slot, mask=slot < end, other=0)
            x = hit_values(values, masks, offsets, slot, slot < end, WIDTH)
            if FLAGS[0]:
                at = token[:, None].to(tl.int64) * d + features[None, :]
                rows = tl.load(e + at, mask=(slot < end)[:, None] & (features < d)[None, :], other=0)
                acc = add_parts(acc, x.T, rows, True, DTYPE, 2 if PARTS > 1 else 1, PRECISION)
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
                acc = add_parts(acc, x.T, rows, True, DTYPE, PARTS, PRECISION)
            if FLAGS[1]:
                sums += tl.sum(x, 0)
        if FLAGS[0]:
            if FLAGS[2]:
                at = (columns - first * WIDTH)[:, None].to(tl.int64) * d + features[None, :]
                acc += tl.load(base + at, mask=mask, other=0.0)
            if FLAGS[3]:
                w = tl.full((WIDTH,), 1.0, tl.float32)
                if FLAGS[4]:
                    w = tl.load(weight + columns, mask=columns < v, other=0.0)
                acc -= w[:, None] * tl.load(shift + features, mask=features < d, other=0.0)[None, :]
            value = round_to(acc * tl.load(scale), out.dtype.element_ty)
            tl.store(out + columns[:, None].to(tl.int64) * d + features[None, :], value, mask=mask)
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
    features = min(BLOCKS.n * 2 // e.element_size(), max(16, next_power_of_2(d)))
    finish_blocks_kernel[(cdiv(stop - start, BLOCK), cdiv(d, features) if d_c is not None else 1)](
        terms.terms if d_c is None else d_c,
        terms.terms if bias_sums is None else bias_sums,
        terms.terms if base is None else base,
        e,
        terms.targets,
        terms.label,
        segments.tokens,
        segments.starts,
        entries.buffers.masks,
        entries.buffers.offsets,
        entries.buffers.values,
        entries.lists.tokens,
        entries.lists.starts,
        entries.dense,
        terms.terms if weight is None else weight,
        terms.terms if shift is None else shift,
        terms.scale,
        start // BLOCK,
        (v, d),
        M=BLOCKS.m,
        WIDTH=BLOCK,
        FEATURES=features,
        FLAGS=tuple(x is not None for x in (d_c, bias_sums, base, shift, weight)),
        PARTS=3 if e.dtype is not torch.float32 else 1,
        DTYPE=DTYPES[e.dtype],
        PRECISION=precision_of(e),
        num_warps=BLOCKS.warps,
        num_stages=BLOCKS.stages,
    )
