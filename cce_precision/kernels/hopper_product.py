"""The two unfiltered products of the backward pass for Hopper (sm_90), in one launch, warp-specialised like hopper.py.

A unit is a tile of dC (dZ^T E over the tokens) or of dE (dZ C over the columns of the run), 192 x 256 or, where so many
fill the multiprocessors better, 128 x 256. Both kinds share the waves of one persistent launch, so that neither leaves
multiprocessors idle at its end. dC leaves finished: the target's terms are added in fp32, the sum is scaled and rounded
once. dE is added to fp32 sums. While one consumer finishes its 64 rows of a tile, the others multiply. Every sum has
one order, whatever the height of the tiles: bitwise repeatable.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .dz import low_of
from .entry import Tiles, entry
from .hopper import BAND, accumulator, barriers, describe, expect, specialize
from .hopper_store import write
from .labels import SHORT, Labels
from .launch import descriptor_fits, hopper_fits, multiprocessors
from .schedule import dealt

__all__ = ["Columns", "add_products", "products_fit"]

FEATURES = gl.constexpr(256)  # columns of a tile
DEPTH = gl.constexpr(64)  # tokens or columns of one step
TOKENS = gl.constexpr(SHORT)  # label terms in flight together
NO_ROW = gl.constexpr(2**31 - 1)
SUMS_LAYOUT = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=32, rank=2))


@gluon.jit
def copy_unit(
    dz,
    other,
    left,
    right,
    full,
    free,
    step,
    length,
    row,
    feature,
    TRANSPOSED: gl.constexpr,
    CONSUMERS: gl.constexpr,
    STAGES: gl.constexpr,
):
    """The producer's part in one sum: dZ in bands of 64 rows of the output, and as many rows of e or c."""
    for at in range(0, length, DEPTH):
        stage = step % STAGES
        mbarrier.wait(free.index(stage), ((step // STAGES) & 1) ^ 1)
        expect(full.index(stage), CONSUMERS * dz.block_type.nbytes + other.block_type.nbytes)
        for which in gl.static_range(CONSUMERS):
            band = left.index(stage * CONSUMERS + which)
            if TRANSPOSED:
                tma.async_copy_global_to_shared(dz, [at, row + which * BAND], full.index(stage), band)
            else:
                tma.async_copy_global_to_shared(dz, [row + which * BAND, at], full.index(stage), band)
        tma.async_copy_global_to_shared(other, [at, feature], full.index(stage), right.index(stage))
        step += 1
    return step


@gluon.jit
def unit_of(turn, own, early, ahead, remainder):
    """The tile of one kind that a program takes in its turn: `own` of the long kind in rounds of all
    programs, then of the short kind: `early` in the `ahead` rounds of those with one long tile fewer, the others in
    rounds of all.
    """
    program, programs = gl.program_id(0), gl.num_programs(0)
    i = turn - own
    free = programs - remainder  # programs with one long tile fewer
    short = gl.where(i < early, program - remainder + i * free, ahead * free + program + (i - early) * programs)
    return gl.where(turn < own, program + turn * programs, short)


@gluon.jit
def copy_operands(
    dz,
    dz_low,
    e,
    c,
    left,
    right,
    full,
    free,
    n,
    width,
    across,
    turns,
    own,
    early,
    ahead,
    remainder,
    rows_first,
    SPLIT: gl.constexpr,
    CONSUMERS: gl.constexpr,
    STAGES: gl.constexpr,
):
    """The producer: what the consumers multiply, in their order."""
    step = 0
    for turn in range(turns):
        unit = unit_of(turn, own, early, ahead, remainder)
        row, feature = unit // across * (CONSUMERS * BAND), unit % across * FEATURES
        if (turn < own) == rows_first:
            if SPLIT:
                step = copy_unit(
                    dz_low, c, left, right, full, free, step, width, row, feature, False, CONSUMERS, STAGES
                )
            step = copy_unit(dz, c, left, right, full, free, step, width, row, feature, False, CONSUMERS, STAGES)
        else:
            if SPLIT:
                step = copy_unit(dz_low, e, left, right, full, free, step, n, row, feature, True, CONSUMERS, STAGES)
            step = copy_unit(dz, e, left, right, full, free, step, n, row, feature, True, CONSUMERS, STAGES)


@gluon.jit
def product_band(
    left,
    right,
    full,
    free,
    step,
    length,
    TRANSPOSED: gl.constexpr,
    SPLIT: gl.constexpr,
    CONSUMERS: gl.constexpr,
    STAGES: gl.constexpr,
    WHICH: gl.constexpr,
):
    """One consumer's (64, 256) sum in fp32, what rounding dZ lost first, and the steps taken so far."""
    acc = gl.zeros([BAND, FEATURES], gl.float32, accumulator(CONSUMERS))
    steps = (length + DEPTH - 1) // DEPTH
    if SPLIT:
        steps *= 2
    for k in range(steps):
        stage = step % STAGES
        mbarrier.wait(full.index(stage), (step // STAGES) & 1)
        a = left.index(stage * CONSUMERS + WHICH)
        if TRANSPOSED:
            a = a.permute((1, 0))
        acc = warpgroup_mma(a, right.index(stage), acc, is_async=True)
        acc = warpgroup_mma_wait(num_outstanding=1, deps=[acc])
        mbarrier.arrive(free.index((step + STAGES - 1) % STAGES), count=1, pred=k > 0)
        step += 1
    acc = warpgroup_mma_wait(num_outstanding=0, deps=[acc])
    mbarrier.arrive(free.index((step + STAGES - 1) % STAGES), count=1)
    return acc, step


@gluon.jit
def add_labels(acc, labels, at, end, position, feature, v, d, layout: gl.constexpr):
    """acc plus label_i e_i of the tokens whose target is one of the 64 columns from `position`, in fp32, by rising
    target: those of a long segment as their sum, see labels.py. at, end: places of the first and after the last.
    """
    e, targets, label, tokens, starts, sums = labels
    by_row: gl.constexpr = gl.SliceLayout(1, layout)
    by_column: gl.constexpr = gl.SliceLayout(0, layout)
    spread: gl.constexpr = gl.BlockedLayout([TOKENS, 2], [1, 32], [1, 4], [1, 0])
    columns = position + gl.arange(0, BAND, by_row)
    features = feature + gl.arange(0, FEATURES, gl.SliceLayout(0, spread))
    first = gl.load(starts + gl.minimum(columns, v), mask=at < end, other=0)
    last = gl.load(starts + gl.minimum(columns + 1, v), mask=at < end, other=0)
    long = last - first > TOKENS
    while at < end:
        begins = long & (first == at)
        after = gl.max(gl.where(begins, last, 0), 0)
        if after > 0:
            value = gl.load(sums + at.to(gl.int64) // TOKENS * d + features, mask=features < d, other=0.0)
            acc = gl.where(begins[:, None], acc + gl.convert_layout(value, by_column)[None, :], acc)
            at = after
        else:
            after = gl.min(gl.where(long & (first > at), first, end), 0)
            after = gl.minimum(after, at + TOKENS)
            place = at + gl.arange(0, TOKENS, gl.SliceLayout(1, spread))
            inside = place < after
            token = gl.load(tokens + place, mask=inside, other=0)
            column = gl.load(targets + token, mask=inside, other=NO_ROW).to(gl.int32)
            x = gl.load(label + token, mask=inside, other=0.0)
            own = inside[:, None] & (features < d)[None, :]
            term = gl.load((e + token * d)[:, None] + features[None, :], mask=own, other=0.0)
            term = x[:, None] * term.to(gl.float32)
            next_column = gl.min(column, 0)
            while next_column != NO_ROW:
                same = column == next_column
                value = gl.convert_layout(gl.sum(gl.where(same[:, None], term, 0.0), 0), by_column)
                acc = gl.where((columns == next_column)[:, None], acc + value[None, :], acc)
                column = gl.where(same, NO_ROW, column)
                next_column = gl.min(column, 0)
            at = after
    return acc


@gluon.jit
def multiply_band(
    shared,
    FLAGS: gl.constexpr,
    CONSUMERS: gl.constexpr,
    STAGES: gl.constexpr,
    WHICH: gl.constexpr,
):
    """One consumer: 64 rows of every tile of its program."""
    (
        left, right, full, free, staging, out, sum_e, labels, scale, shape,
        across, turns, own, early, ahead, remainder, rows_first,
    ) = shared  # fmt: skip
    layout: gl.constexpr = accumulator(CONSUMERS)
    sums = staging._reinterpret(gl.float32, [2 * CONSUMERS, BAND, 32], SUMS_LAYOUT)
    n, width, d, start, v = shape
    if FLAGS[0]:
        factor = gl.load(scale)
    step = 0
    for turn in range(turns):
        unit = unit_of(turn, own, early, ahead, remainder)
        row, feature = (unit // across * CONSUMERS + WHICH) * BAND, unit % across * FEATURES
        if (turn < own) == rows_first:
            if FLAGS[3]:
                acc, step = product_band(
                    left, right, full, free, step, width, False, FLAGS[1], CONSUMERS, STAGES, WHICH
                )
                write(sums, sum_e, acc, row, feature, True, 2 * WHICH)
        elif FLAGS[0]:
            if FLAGS[2]:
                first = gl.load(labels[4] + gl.minimum(start + row, v))
                last = gl.load(labels[4] + gl.minimum(start + row + BAND, v))
            acc, step = product_band(left, right, full, free, step, n, True, FLAGS[1], CONSUMERS, STAGES, WHICH)
            if FLAGS[2]:
                acc = add_labels(acc, labels, first, last, start + row, feature, v, d, layout)
            write(staging, out, (acc * factor).to(out.dtype), row, feature, False, 2 * WHICH)
    tma.store_wait(0)


@entry
@gluon.jit
def hopper_product_kernel(
    dz,  # (N, W) descriptor, tiles (64, 64)
    dz_low,  # (N, W) descriptor of what rounding dz lost, or unused
    e,  # (N, D) descriptor, tiles (64, 256)
    c,  # (W, D) descriptor, tiles as of e
    out,  # (W, D) descriptor, tiles (64, 64): dC of the run; or unused
    sum_e,  # (N, D) descriptor of fp32 sums of dE, tiles (64, 32); or unused
    labels,  # Labels.tensors, or six unused
    scale,  # () fp32
    active,  # () int32: 0 where nothing is to be done, else 1; or unused
    shape,  # (N, W, D, position of the first column, V)
    own_units,  # tiles of the kind that comes first, the long ones
    other_units,
    ahead,  # rounds of the other kind that programs with one long tile fewer take before the rest
    rows_first,  # 1: dE's tiles are the long ones
    FLAGS: gl.constexpr,  # (dC, split, label apart, dE, active)
    CONSUMERS: gl.constexpr,  # of 64 rows of a tile each
    STAGES: gl.constexpr,
):
    left = gl.allocate_shared_memory(dz.dtype, [CONSUMERS * STAGES, BAND, DEPTH], dz.layout)
    right = gl.allocate_shared_memory(e.dtype, [STAGES, DEPTH, FEATURES], e.layout)
    staging = gl.allocate_shared_memory(out.dtype, [2 * CONSUMERS, BAND, 64], out.layout)
    full, free = barriers(CONSUMERS, STAGES)
    n, width, d, start, v = shape
    across = (d + FEATURES - 1) // FEATURES
    program, programs = gl.program_id(0), gl.num_programs(0)
    remainder = own_units % programs
    own = (own_units - program + programs - 1) // programs
    early = gl.where(program < remainder, 0, ahead)
    late = other_units - ahead * (programs - remainder) - program
    turns = own + early + (gl.maximum(late, 0) + programs - 1) // programs
    if FLAGS[4]:
        turns *= gl.load(active)
    rows_first = rows_first != 0
    shared = (
        left, right, full, free, staging, out, sum_e, labels, scale, shape,
        across, turns, own, early, ahead, remainder, rows_first,
    )  # fmt: skip
    specialize(
        multiply_band, (shared, FLAGS, CONSUMERS, STAGES), CONSUMERS, copy_operands,
        (
            dz, dz_low, e, c, left, right, full, free, n, width, across, turns, own, early, ahead, remainder,
            rows_first, gl.constexpr(FLAGS[1]), CONSUMERS, STAGES,
        ),
    )  # fmt: skip


@dataclass(frozen=True)
class Columns:
    """A run's rows of dC, and what makes the sums over the tokens into them."""

    out: Tensor  # (W, D) contiguous
    scale: Tensor  # 0-dim fp32
    labels: Labels | None
    start: int  # position of the first row


def products_fit(c: Tensor) -> bool:
    """Whether `add_products` takes rows of c (V, D), beside contiguous matrices of the same D and dtype."""
    return c.shape[1] % 8 == 0 and descriptor_fits(c) and hopper_fits(c, True)


def add_products(
    operands: list[Tensor],  # (N, W) each: dZ, and for SPLIT what rounding lost
    e: Tensor,  # (N, D)
    c: Tensor,  # (W, D)
    columns: Columns | None,
    sum_e: Tensor | None,  # (N, D) fp32
    active: Tensor | None = None,  # () int32: 0 where nothing is to be done, else 1
) -> None:
    """dZ^T E plus the label terms, scaled and rounded once, and sum_e += dZ C; None: not wanted, but one of them is.

    e, the sums and dC contiguous; for the rest see `products_fit`.
    """
    dz, low = operands[0], low_of(operands)
    n, width = dz.shape
    d = e.shape[1]
    deal = dealt(n, width, d, (sum_e is not None, columns is not None), multiprocessors(e.device))
    units = deal.units_e, deal.units_c
    own_units, other_units = units if deal.schedule.rows_first else reversed(units)
    labels = None if columns is None else columns.labels
    positions = (0, 0) if columns is None or labels is None else (columns.start, labels.segments.starts.shape[0] - 1)
    unused = e
    programs = min(sum(units), multiprocessors(e.device))
    hopper_product_kernel[(programs,)](
        describe(dz, 64, 64),
        unused if low is None else describe(low, 64, 64),
        describe(e, 64, 256),
        describe(c, 64, 256),
        describe(e if columns is None else columns.out, 64, 64),
        unused if sum_e is None else Tiles(sum_e, (64, 32), SUMS_LAYOUT.value),
        (unused,) * 6 if labels is None else labels.tensors,
        unused if columns is None else columns.scale,
        unused if active is None else active,
        (n, width, d, *positions),
        own_units,
        other_units,
        deal.schedule.ahead,
        int(deal.schedule.rows_first),
        FLAGS=tuple(x is not None for x in (columns, low, labels, sum_e, active)),
        CONSUMERS=deal.rows // 64,
        STAGES=3,
        num_warps=4,
    )
