"""dZ for Hopper (sm_90), warp-specialised like the forward pass in hopper.py: same bits as dz.dz_kernel."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma

from ..problem import Problem
from .entry import entry
from .hopper import (
    BAND,
    COLUMNS,
    CONSUMERS,
    LOG2E,
    ROWS,
    accumulator,
    barriers,
    copy_tiles,
    describe,
    logits_band,
    operands,
    place_of,
    specialize,
    tanh,
)
from .hopper_store import write
from .launch import cdiv, multiprocessors
from .record import units_of
from .schedule import DZ_ROWS
from .terms import RowTerms

if TYPE_CHECKING:
    from .dz import Outputs, Run


@gluon.jit
def dz_band(
    shared,
    FLAGS: gl.constexpr,
    GROUP: gl.constexpr,
    STAGES: gl.constexpr,
    WHICH: gl.constexpr,
):
    """One consumer of the dZ pass: x = P alpha, the target's entry 0 or the label's term; written through shared
    memory.
    """
    (
        left, right, full, free, out, dz, dz_low, targets, rows_terms, label, bias, row_stats, chosen, alive,
        n, width, d, start, units, blocks, tiles, temperature, softcap,
    ) = shared  # fmt: skip
    layout: gl.constexpr = accumulator(CONSUMERS)
    by_row: gl.constexpr = gl.SliceLayout(1, layout)
    by_column: gl.constexpr = gl.SliceLayout(0, layout)
    LABEL: gl.constexpr = FLAGS[0]
    STATS: gl.constexpr = FLAGS[1]
    CHOSEN: gl.constexpr = FLAGS[2]
    FILTER: gl.constexpr = FLAGS[3]
    SOFTCAP: gl.constexpr = FLAGS[5]
    count = 0
    for unit in range(gl.program_id(0), units, gl.num_programs(0)):
        block, tile = place_of(unit, blocks, tiles, GROUP)
        if CHOSEN:
            code = gl.load(chosen + 1 + unit)
            block, tile = code // tiles, code % tiles
        acc, count = logits_band(left, right, full, free, count, d, STAGES, WHICH)
        row = (block * CONSUMERS + WHICH) * BAND
        rows = row + gl.arange(0, BAND, by_row)
        inside = rows < n
        lse = gl.load(rows_terms + rows, mask=inside, other=float("inf"))
        alpha = gl.load(rows_terms + gl.to_tensor(n).to(gl.int64) + rows, mask=inside, other=0.0)
        local = gl.load(targets + rows, mask=inside, other=-1).to(gl.int32) - start - tile * COLUMNS
        hit = (local >= 0) & (local < COLUMNS)
        some_hit = gl.max(hit.to(gl.int32), 0) > 0  # few tiles hold a target
        columns = gl.arange(0, COLUMNS, by_column)
        if FLAGS[4]:
            at = tile * COLUMNS + columns
            acc += gl.load(bias + at, mask=at < width, other=0.0).to(gl.float32)[None, :]
        if STATS or FILTER:  # noqa: SIM102
            if tile * COLUMNS + COLUMNS > width:
                acc = gl.where((columns < width - tile * COLUMNS)[None, :], acc, float("-inf"))
        if STATS:
            gl.store(row_stats + gl.to_tensor(n).to(gl.int64) * (tiles + tile) + rows, gl.max(acc, 1), mask=inside)
        if SOFTCAP:  # the label stands apart, so the slope may come before the target's entry is set to 0
            t = tanh(acc * (1.0 / softcap))
            x = gl.exp2((softcap * t * (1.0 / temperature) - lse[:, None]) * LOG2E) * (1.0 - t * t)
        else:
            x = gl.exp2((acc * (1.0 / temperature) - lse[:, None]) * LOG2E)
        if some_hit:
            x = gl.where(columns[None, :] == local[:, None], 0.0, x)
        if STATS:
            gl.store(row_stats + gl.to_tensor(n).to(gl.int64) * tile + rows, gl.sum(x, 1), mask=inside)
        if FLAGS[8]:
            least = gl.load(rows_terms + gl.to_tensor(n).to(gl.int64) * 5 + rows, mask=inside, other=0.0)
            x = gl.where(x < least[:, None], 0.0, x)
        if FILTER:  # as integers non-negative floats keep their order, and NaN is the largest
            complement = gl.load(rows_terms + gl.to_tensor(n).to(gl.int64) * 5 + rows, mask=inside & hit, other=0.0)
            complement = complement.to(gl.int32, bitcast=True) & 0x7FFFFFFF
            bits = x.to(gl.int32, bitcast=True) & 0x7FFFFFFF
            of_half = gl.max(gl.where((columns < 128)[None, :], bits, 0), 1)
            of_half = gl.maximum(of_half, gl.where(local < 128, complement, 0))
            at = alive + row // 128 * ((width + 127) // 128) + tile * 2
            gl.atomic_max(at, gl.max(of_half, 0), mask=row < n)
            of_half = gl.max(gl.where((columns < 128)[None, :], 0, bits), 1)
            of_half = gl.maximum(of_half, gl.where(local < 128, 0, complement))
            gl.atomic_max(at + 1, gl.max(of_half, 0), mask=(row < n) & (tile * COLUMNS + 128 < width))
        x = x * alpha[:, None]
        if LABEL:  # noqa: SIM102
            if some_hit:
                own = columns[None, :] == local[:, None]
                x = gl.where(own, gl.load(label + rows, mask=inside, other=0.0)[:, None], x)
        high = x.to(dz.dtype)
        if STATS:  # runs of columns below each other, each with N rounded up to 128 rows
            run, height = (dz.shape[1] + COLUMNS - 1) // COLUMNS, blocks * ROWS
            write(out, dz, high, tile // run * height + row, tile % run * COLUMNS, False, 2 * WHICH)
        else:
            write(out, dz, high, row, tile * COLUMNS, False, 2 * WHICH)
        if FLAGS[6]:
            write(out, dz_low, (x - high.to(gl.float32)).to(dz.dtype), row, tile * COLUMNS, False, 2 * WHICH)
    tma.store_wait(0)


@entry
@gluon.jit
def hopper_dz_kernel(
    e,  # (N, D) descriptor, tiles (64, 64)
    c,  # (W, D) descriptor, tiles (256, 64)
    dz,  # (N, W) descriptor, tiles (64, 128); with statistics (runs x N rounded up to 128, columns of a run)
    dz_low,  # (N, W) descriptor of what rounding dz lost, or unused
    targets,  # (N,) int64
    rows_terms,  # (6, N) fp32
    label,  # (N,) fp32
    bias,  # (W,) or unused
    row_stats,  # (2, column tiles, N) fp32 or unused
    chosen,  # (units + 1,) int32 or unused
    alive,  # (row blocks, tiles of 128 columns) int32 zeros: the largest |P - onehot| as fp32 bits; or unused
    active,  # () int32: 0 where nothing is to be done, else 1; or unused
    n,
    width,
    d,
    start,
    temperature,
    softcap,
    FLAGS: gl.constexpr,  # (label, row statistics, chosen tiles, filter, bias, softcap, split, active, flushed)
    GROUP: gl.constexpr,
    STAGES: gl.constexpr,
):
    left, right = operands(e, c, STAGES)
    out = gl.allocate_shared_memory(dz.dtype, [2 * CONSUMERS, BAND, COLUMNS // 2], dz.layout)
    full, free = barriers(CONSUMERS, STAGES)
    blocks = (n + ROWS - 1) // ROWS
    tiles = (width + COLUMNS - 1) // COLUMNS
    units = blocks * tiles
    if FLAGS[2]:
        units = gl.load(chosen)
    if FLAGS[7]:
        units *= gl.load(active)
    first, last, step = gl.program_id(0), units, gl.num_programs(0)
    never = gl.to_tensor(-1)
    shared = (
        left, right, full, free, out, dz, dz_low, targets, rows_terms, label, bias, row_stats, chosen, alive,
        n, width, d, start, units, blocks, tiles, temperature, softcap,
    )  # fmt: skip
    specialize(
        dz_band, (shared, FLAGS, GROUP, STAGES), CONSUMERS, copy_tiles,
        (
            e, c, left, right, full, free, first, last, step, never, blocks, tiles, d, chosen, gl.constexpr(FLAGS[2]),
            GROUP, STAGES,
        ),
    )  # fmt: skip


def launch_dz(
    problem: Problem,
    e: Tensor,
    run: Run,
    dz: Tensor,
    dz_low: Tensor | None,
    terms: RowTerms,
    outputs: Outputs,
    group: int,
) -> None:
    """Fills dz, dz_low (N, W) and the row statistics as dz.dz_kernel does without entropy, smoothing and column sums.

    With statistics dz may be (runs x N rounded up to 128, columns of a run, which 256 divides), runs of columns below
    each other.

    Under a softcap the label must stand apart. outputs.alive (zeros on entry) receives the largest |P - onehot| of each
    128 x 128 tile as fp32 bits.
    """
    n, width = e.shape[0], run.c.shape[0]
    stats, chosen, alive = outputs.row_stats, outputs.chosen, outputs.alive
    units = cdiv(n, DZ_ROWS) * cdiv(width, 256)
    if chosen is not None:
        chosen = units_of(chosen, group, 1 if alive is None else 2)  # a filter's tiles have 128 columns
    optional = (terms.label_inside, stats is not None, chosen is not None, alive is not None)
    split, active = dz_low is not None, outputs.active is not None
    flags = (*optional, run.bias is not None, problem.softcap is not None, split, active, terms.flushed)
    hopper_dz_kernel[(min(units, multiprocessors(e.device)),)](
        describe(e, 64, 64),
        describe(run.c, 256, 64),
        describe(dz, 64, 128),
        e if dz_low is None else describe(dz_low, 64, 128),
        terms.targets,
        terms.terms,
        terms.label,
        terms.terms if run.bias is None else run.bias,
        terms.terms if stats is None else stats,
        terms.targets if chosen is None else chosen,
        terms.targets if alive is None else alive,
        terms.targets if outputs.active is None else outputs.active,
        n,
        width,
        e.shape[1],
        run.start,
        float(problem.temperature),
        float(problem.softcap or 1.0),
        FLAGS=flags,
        GROUP=group,
        STAGES=3,
        num_warps=4,
    )
