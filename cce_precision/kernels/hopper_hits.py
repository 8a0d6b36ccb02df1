"""The forward walk of hits.py for Hopper (sm_90), warp-specialised like hopper.py: same heads and same record.

The draws of a tile take as long as the softmax's powers several times over. Here one consumer draws while the other
multiplies.
"""

from __future__ import annotations

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from ..problem import Problem
from .entry import entry
from .hits import how_many
from .hopper import (
    BAND,
    COLUMNS,
    CONSUMERS,
    ROWS,
    accumulator,
    barriers,
    copy_tiles,
    describe,
    halves,
    logits_band,
    online_softmax_update,
    operands,
    place_of,
    specialize,
    store_partial,
    without_target,
)
from .launch import cdiv
from .primitives import BEYOND, column_word, either, row_word

__all__ = ["launch_hits"]

BLOCKS = gl.constexpr(COLUMNS.value // 16)  # of a tile, a bit each


@gluon.jit
def block_bits(x, lowest):
    """(64,) int32: bit b is whether some x (64, C) of the block b of 16 columns reaches `lowest` (64,).

    A thread's own largest first, then the bits of its neighbours: no largest value travels.
    """
    blocks: gl.constexpr = x.shape[1] // 16
    top = gl.max(gl.max(gl.reshape(x, [BAND, blocks, 2, 4, 2]), 4), 2)  # (64, blocks, 4)
    low = gl.convert_layout(lowest, gl.SliceLayout(1, gl.SliceLayout(2, top.type.layout)))
    bit = 1 << gl.arange(0, blocks, gl.SliceLayout(0, gl.SliceLayout(2, top.type.layout)))
    found = gl.where(top >= gl.expand_dims(gl.expand_dims(low, 1), 2), gl.expand_dims(gl.expand_dims(bit, 0), 2), 0)
    words = gl.reduce(gl.reduce(found, 1, either), 1, either)
    return gl.convert_layout(words, lowest.type.layout)


@gluon.jit
def drawn_bits(p, limit, by_row, first):
    """(64,) int32: bit b is whether some p (64, C) of the block b reaches limit (64,) times the draw of its column, of
    first to first + C; by halves, for the sake of registers.
    """
    if p.shape[1] > 64:
        left, right = halves(p)
        bits = drawn_bits(left, limit, by_row, first)
        more = drawn_bits(right, limit, by_row, first + p.shape[1] // 2)
        return bits | (more << (p.shape[1] // 32))
    else:
        columns = first + gl.arange(0, p.shape[1], gl.SliceLayout(0, p.type.layout))
        rows = gl.convert_layout(by_row, gl.SliceLayout(1, p.type.layout))
        limits = gl.convert_layout(limit, gl.SliceLayout(1, p.type.layout))
        by_column = column_word(columns.to(gl.uint32))
        words = [rows[:, None], by_column[None, :], p, limits[:, None]]
        x = gl.inline_asm_elementwise(BEYOND, "=f,r,r,f,f", words, dtype=gl.float32, is_pure=True, pack=1)
        return block_bits(x, gl.full([BAND], 1.0e-37, gl.float32, limit.type.layout))


@gluon.jit
def hits_band(shared, FLAGS: gl.constexpr, STAGES: gl.constexpr, WHICH: gl.constexpr):
    """One consumer: softmax and record of its rows over column tiles first to last."""
    (
        left, right, full, free, targets, bias, bounds, partial, target_logit, record, hits, seed, block, split, first,
        last, n, v, d, first_id, splits, scale, softcap, log_eps,
    ) = shared  # fmt: skip
    layout: gl.constexpr = accumulator(CONSUMERS)
    by_row: gl.constexpr = gl.SliceLayout(1, layout)
    each_thread: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    rows = (block * CONSUMERS + WHICH) * BAND + gl.arange(0, BAND, by_row)
    inside = rows < n
    target = gl.load(targets + rows, mask=inside, other=-1).to(gl.int32)
    known = gl.load(bounds + rows, mask=inside, other=0.0)
    value = gl.load(seed)
    words_of_rows = row_word(
        (value & 0xFFFFFFFF).to(gl.uint32), ((value >> 32) & 0xFFFFFFFF).to(gl.uint32), rows.to(gl.uint32)
    )
    m = gl.full([BAND], float("-inf"), gl.float32, by_row)
    s = gl.zeros([BAND], gl.float32, by_row)
    count = 0
    for tile in range(first, last):
        beyond_room = gl.load(hits + gl.zeros([128], gl.int32, each_thread), volatile=True)
        acc, count = logits_band(left, right, full, free, count, d, STAGES, WHICH)
        z, hit, local = without_target(acc, target, bias, target_logit, rows, tile, v, softcap, FLAGS, layout)
        m, s, reference, _, p = online_softmax_update(m, s, z, gl.max(z, 1), scale)
        lowest = gl.maximum(known, m * scale + gl.log2(s)) + log_eps
        if gl.max(beyond_room, 0) > 0:  # one answer for all threads, which read at different times
            blocks = gl.minimum((v - tile * COLUMNS + 15) // 16, BLOCKS)
            bits = gl.full([BAND], 1, gl.int32, by_row) * ((1 << blocks) - 1)
        else:
            if FLAGS[2]:
                limit = gl.exp2(gl.minimum(lowest - reference, 120.0))  # no p reaches 2^120 u
                bits = drawn_bits(p, limit, words_of_rows, first_id + tile * COLUMNS)
            else:
                bits = block_bits(z * scale, gl.maximum(lowest, -3.0e38))
            bits |= gl.where(hit, 1 << (gl.where(hit, local, 0) // 16), 0)
            gl.atomic_add(hits, gl.sum(gl.where(target >= 0, how_many(bits), 0), 0), sem="relaxed")
        place = record + gl.to_tensor(n).to(gl.int64) * tile + rows
        gl.store(place, gl.where(target >= 0, bits, 0).to(gl.int16), mask=inside)
    store_partial(partial, m, s, rows, inside, split, splits, n)


@entry
@gluon.jit
def hopper_hits_kernel(
    e,  # (N, D) descriptor, tiles (64, 64)
    c,  # (V, D) descriptor, tiles (256, 64)
    bias,  # (V,) or unused
    targets,  # (N,) int64
    bounds,  # (N,) fp32 lower bounds of the lse in base 2
    partial,  # (2, splits, N) fp32
    target_logit,  # (N,) fp32
    record,  # (column tiles, N) int16
    hits,  # () int32, see hits.hits_kernel
    seed,  # () int64
    shape,  # (N, V, D, number of the first column in the whole vocabulary)
    splits,
    tiles_a_split,
    scalars,  # (softcap, log2(e) / temperature, log2 of the threshold)
    FLAGS: gl.constexpr,  # (bias, softcap, drawn)
    GROUP: gl.constexpr,
    STAGES: gl.constexpr,
):
    left, right = operands(e, c, STAGES)
    full, free = barriers(CONSUMERS, STAGES)
    n, v, d, first_id = shape
    softcap, scale, log_eps = scalars
    block, split = place_of(gl.program_id(0), (n + ROWS - 1) // ROWS, splits, GROUP)
    first = split * tiles_a_split
    last = gl.minimum(first + tiles_a_split, (v + COLUMNS - 1) // COLUMNS)
    one = gl.to_tensor(1)
    shared = (
        left, right, full, free, targets, bias, bounds, partial, target_logit, record, hits, seed, block, split, first,
        last, n, v, d, first_id, splits, scale, softcap, log_eps,
    )  # fmt: skip
    specialize(
        hits_band, (shared, FLAGS, STAGES), CONSUMERS, copy_tiles,
        (
            e, c, left, right, full, free, first, last, one, block, one, one, d, targets, gl.constexpr(False), GROUP,
            STAGES,
        ),
    )  # fmt: skip


def launch_hits(
    problem: Problem,
    drawn: bool,
    seed: Tensor,
    bounds: Tensor,  # (N,) in base 2
    record: Tensor,  # (column tiles, N) int16
    outputs: tuple[Tensor, Tensor, Tensor],  # partial, target_logit and count of hits
    splits: tuple[int, int],  # their number, and the tiles of each
    scalars: tuple[float, float, float],
    group: int,
) -> None:
    """Fills record and outputs as the forward walk of hits.hits_kernel does."""
    partial, target_logit, hits = outputs
    n = problem.n
    hopper_hits_kernel[(cdiv(n, 128) * splits[0],)](
        describe(problem.e, 64, 64),
        describe(problem.c, 256, 64),
        bounds if problem.bias is None else problem.bias,
        problem.targets,
        bounds,
        partial,
        target_logit,
        record,
        hits,
        seed,
        (n, problem.v, problem.d, problem.first_column),
        *splits,
        scalars,
        FLAGS=(problem.bias is not None, problem.softcap is not None, drawn),
        GROUP=group,
        STAGES=4,
        num_warps=4,
    )
