"""dZ of a run of columns: the logits again, and from them x = P (alpha - kappa (log P + H)) in the operand's dtype.

The label's entry is 0 (its term is added apart, in fp32) or the given label term; the other conventions stand in
AGENTS.md.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..problem import Problem
from .entry import entry
from .heads import operand
from .launch import (
    Config,
    architecture,
    cdiv,
    config_for,
    descriptor_fits,
    hopper_fits,
    multiprocessors,
    precision_of,
    tuned,
)
from .primitives import LOG2E, cap, grouped, load_tile, multiply_add, round_to, wide
from .record import units_of
from .terms import RowTerms

__all__ = ["Run", "TileFilter", "block_rows", "low_of", "write_dz", "write_powers"]


@entry
@triton.jit
def dz_kernel(
    e,  # (N, D) descriptor or pointer, ignored rows 0
    c,  # (W, D) descriptor or pointer, this run of columns
    bias,  # (W,) or unused
    weight,  # (W,) column weights of the smooth head, or unused
    targets,  # (N,) int64 positions in visiting order, -1 where ignored
    rows_terms,  # (6, N) fp32: lse, alpha, kappa, entropy, sigma, 1 - P_t or what entries are flushed below
    label,  # (N,) fp32 the label's entry of dZ: before the slope where it stands in dz, after it where apart
    dz,  # (N, W) operand dtype: descriptor or pointer
    dz_low,  # (N, W) what rounding dz lost, or unused
    alive,  # (row blocks, column tiles) int32: the largest |P - onehot| of the tile as fp32 bits; or unused
    column_sums,  # (row blocks, W) fp32 sums of the unrounded dZ, the label always included, or unused
    row_stats,  # (2, column tiles, N) fp32 row sums of dZ and row maxima of the logits, or unused
    chosen,  # (units + 1,) int32: how many tiles to compute, and which, see record.units_of; or unused
    active,  # () int32: 0 where nothing is to be done, else 1; or unused
    shape,  # (N, W, D, position of the first column)
    stride_e,
    stride_c,
    stride_dz,
    scalars,  # (softcap, temperature, fp32 bits of the filter's threshold)
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    GROUP: tl.constexpr,
    FLATTEN: tl.constexpr,
    # (bias, softcap, entropy, smooth, weight, label, split, sums, filter, skip dead tiles, sums of surviving tiles
    # alone, row statistics, chosen tiles, active, flushed)
    FLAGS: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
    DTYPE: tl.constexpr,
):
    n, width, d, start = shape
    softcap, temperature, eps_bits = scalars
    BIAS: tl.constexpr = FLAGS[0]
    SOFTCAP: tl.constexpr = FLAGS[1]
    ENTROPY: tl.constexpr = FLAGS[2]
    SMOOTH: tl.constexpr = FLAGS[3]
    WEIGHT: tl.constexpr = FLAGS[4]
    LABEL: tl.constexpr = FLAGS[5]
    SPLIT: tl.constexpr = FLAGS[6]
    SUMS: tl.constexpr = FLAGS[7]
    FILTER: tl.constexpr = FLAGS[8]
    SKIP: tl.constexpr = FLAGS[9]
    blocks, tiles = tl.cdiv(n, M), tl.cdiv(width, N)
    units = blocks * tiles
    if FLAGS[12]:
        units = tl.load(chosen)
    if FLAGS[13]:
        units *= tl.load(active)
    for unit in tl.range(tl.program_id(0), units, tl.num_programs(0), flatten=FLATTEN):
        block, tile = grouped(unit, blocks, tiles, GROUP)
        if FLAGS[12]:
            code = tl.load(chosen + 1 + unit)
            block, tile = code // tiles, code % tiles
        acc = tl.zeros((M, N), tl.float32)
        for k in range(0, d, K):
            left = load_tile(e, stride_e, block * M, k, n, d, M, K, TMA)
            right = load_tile(c, stride_c, tile * N, k, width, d, N, K, TMA)
            acc = multiply_add(left, right.T, acc, PRECISION)
        rows = block * M + tl.arange(0, M)
        inside = rows < n
        columns = tile * N + tl.arange(0, N)
        if BIAS:
            acc += tl.load(bias + columns, mask=columns < width, other=0).to(tl.float32)[None, :]
        z, slope = cap(acc, softcap, SOFTCAP)
        lse = tl.load(rows_terms + rows, mask=inside, other=0.0)
        factor = tl.load(rows_terms + wide(n) + rows, mask=inside, other=0.0)[:, None]
        log_p = z * (1.0 / temperature) - lse[:, None]
        x = tl.exp2(log_p * LOG2E)
        local = tl.load(targets + rows, mask=inside, other=-1).to(tl.int32) - start - tile * N
        hit = (local >= 0) & (local < N)
        some_hit = tl.sum(hit.to(tl.int32)) > 0  # few tiles hold a target
        if some_hit:
            x = tl.where(tl.arange(0, N)[None, :] == local[:, None], 0.0, x)
        if FLAGS[11]:
            known = (columns < width)[None, :]
            out = row_stats + wide(n) * tile + rows
            tl.store(out, tl.sum(tl.where(known, x, 0.0), 1), mask=inside)
            tl.store(out + wide(n) * tiles, tl.max(tl.where(known, z, float("-inf")), 1), mask=inside)
        if FLAGS[14]:
            least = tl.load(rows_terms + wide(n) * 5 + rows, mask=inside, other=0.0)
            x = tl.where(x < least[:, None], 0.0, x)
        survives = True
        if FILTER:  # as integers non-negative floats keep their order, and NaN is the largest
            complement = tl.load(rows_terms + wide(n) * 5 + rows, mask=inside & hit, other=0.0)
            known = tl.where((inside[:, None]) & (columns < width)[None, :], x, 0.0)
            largest = tl.max(known.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
            largest = tl.maximum(largest, tl.max(complement.to(tl.int32, bitcast=True) & 0x7FFFFFFF))
            survives = largest >= eps_bits
            tl.store(alive + block * tiles + tile, largest)
        if ENTROPY:
            kappa = tl.load(rows_terms + wide(n) * 2 + rows, mask=inside, other=0.0)
            entropy = tl.load(rows_terms + wide(n) * 3 + rows, mask=inside, other=0.0)
            factor = factor - kappa[:, None] * (tl.maximum(log_p, -1024.0) + entropy[:, None])
        x *= factor
        apart = tl.zeros((N,), tl.float32)  # column sums of the label's terms that stay out of the operand
        if LABEL:
            if some_hit:
                own = tl.arange(0, N)[None, :] == local[:, None]
                x = tl.where(own, tl.load(label + rows, mask=inside, other=0.0)[:, None], x)
        elif SUMS:  # noqa: SIM102
            if some_hit:
                own = tl.arange(0, N)[None, :] == local[:, None]
                apart = tl.sum(tl.where(own, tl.load(label + rows, mask=inside, other=0.0)[:, None], 0.0), 0)
        if SMOOTH:
            sigma = tl.load(rows_terms + wide(n) * 4 + rows, mask=inside, other=0.0)
            if WEIGHT:
                x -= sigma[:, None] * tl.load(weight + columns, mask=columns < width, other=0.0)[None, :]
            else:
                x -= sigma[:, None]
        x *= slope
        if SUMS:
            total = apart + tl.sum(tl.where(inside[:, None], x, 0.0), 0)
            if FLAGS[10]:
                total = tl.where(survives, total, 0.0)
            tl.store(column_sums + wide(width) * block + columns, total, mask=columns < width)
        high = round_to(x, DTYPE)
        column = tile * N
        if SKIP:  # no product reads a dead tile: store it outside, where nothing is written
            column = tl.where(survives, column, tiles * N)
        store_tile(dz, stride_dz, block * M, column, n, width, high, M, N, TMA)
        if SPLIT:
            low = round_to(x - high.to(tl.float32), DTYPE)
            store_tile(dz_low, stride_dz, block * M, tile * N, n, width, low, M, N, TMA)


@triton.jit
def store_tile(
    x, stride, row, column, rows, columns, value, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TMA: tl.constexpr
):
    """x[row : row + ROWS, column : column + COLUMNS] = value, inside (rows, columns)."""
    if TMA:
        x.store([row, column], value)
    else:
        i = row + tl.arange(0, ROWS)
        j = column + tl.arange(0, COLUMNS)
        place = i[:, None].to(tl.int64) * stride[0] + j[None, :].to(tl.int64) * stride[1]
        tl.store(x + place, value, mask=(i < rows)[:, None] & (j < columns)[None, :])


@dataclass(frozen=True)
class Run:
    """A run of columns in visiting order."""

    start: int  # position of the first
    c: Tensor  # (W, D)
    bias: Tensor | None  # (W,)
    weight: Tensor | None  # (W,)


@dataclass(frozen=True)
class Outputs:
    """What a launch writes beside dZ, and what it computes (None: everything)."""

    sums: Tensor | None = None  # (row blocks, W)
    alive: Tensor | None = None  # (row blocks, column tiles) int32 zeros
    row_stats: Tensor | None = None  # (2, column tiles, N)
    chosen: Tensor | None = None  # (row blocks, column tiles), not 0: computed
    active: Tensor | None = None  # () int32: 0 where nothing is, else 1


@dataclass(frozen=True)
class TileFilter:
    """The paper's filter on one or both sides: which tiles count as dead, and who may skip them."""

    eps: float
    tile: tuple[int, int]
    skip: bool  # both sides are filtered, so a dead tile need not be written
    columns: bool  # dC is filtered, and with it dbias

    @property
    def bits(self) -> int:
        """eps as fp32 bits: as integers non-negative floats keep their order."""
        return int(struct.unpack("i", struct.pack("f", self.eps))[0])

    def config(self, x: Tensor) -> Config:
        m, n = self.tile
        if x.device.type != "cuda":
            return Config(m, n, 16, 4, 1, group=2)
        if x.element_size() == 4:
            return Config(m, n, 32, 8, 2)
        flatten = architecture(x.device) != "sm_80"
        return Config(m, n, 64 if flatten else 32, 8 if m * n >= 8192 else 4, 4, flatten=flatten)


def low_of(operands: list[Tensor]) -> Tensor | None:
    """What rounding dZ lost, where it is kept beside dZ."""
    return operands[1] if len(operands) > 1 else None


def write_dz(
    problem: Problem,
    e: Tensor,  # (N, D) contiguous, ignored rows 0
    run: Run,
    terms: RowTerms,
    dz: Tensor,  # (N, W)
    dz_low: Tensor | None,  # (N, W)
    want_sums: bool,
    tile_filter: TileFilter | None = None,
    chosen: Tensor | None = None,  # (row blocks, column tiles) of the filter: 0 where a tile is known to be dead
    active: Tensor | None = None,  # () int32: 0 where nothing is to be done, and then the sums are 0; else 1
) -> tuple[Tensor | None, Tensor | None]:
    """Fills dz (and dz_low). Returns the column sums (W,) of the unrounded dZ if wanted, and under a filter the (row
    blocks, column tiles) int32 matrix of the largest |P - onehot| of each tile as fp32 bits, 0 where none was computed.
    """
    rows, width = e.shape[0], run.c.shape[0]
    if tile_filter is None:
        config = tuned(
            "dz", run.c, lambda candidate: _launch(problem, e, run, terms, dz, dz_low, Outputs(), None, candidate)
        )
    else:
        config = tile_filter.config(run.c)
    grid = (cdiv(rows, config.m), cdiv(width, config.n))
    sums = torch.zeros((grid[0], width), dtype=torch.float32, device=e.device) if want_sums else None
    alive = torch.zeros(grid, dtype=torch.int32, device=e.device) if tile_filter is not None else None
    _launch(problem, e, run, terms, dz, dz_low, Outputs(sums, alive, None, chosen, active), tile_filter, config)
    return None if sums is None else sums.sum(0), alive


def _launch(
    problem: Problem,
    e: Tensor,
    run: Run,
    terms: RowTerms,
    dz: Tensor,
    dz_low: Tensor | None,
    outputs: Outputs,
    tile_filter: TileFilter | None,
    config: Config,
) -> None:
    sums, alive, row_stats = outputs.sums, outputs.alive, outputs.row_stats
    rows, width = e.shape[0], run.c.shape[0]
    tma = descriptor_fits(e) and descriptor_fits(run.c) and descriptor_fits(dz)
    tile = [config.m, config.n]
    weighted = terms.smooth_inside and run.weight is not None
    flags = (
        run.bias is not None,
        problem.softcap is not None,
        terms.entropy,
        terms.smooth_inside,
        weighted,
        terms.label_inside,
        dz_low is not None,
        sums is not None,
        tile_filter is not None,
        tile_filter is not None and tile_filter.skip,
        tile_filter is not None and tile_filter.columns,
        row_stats is not None,
        outputs.chosen is not None,
        outputs.active is not None,
        terms.flushed,
    )
    bits = 0 if tile_filter is None else tile_filter.bits
    made_for = config.hopper if tile_filter is None else tile_filter.tile == (128, 128)
    # hopper_dz.py knows bias, label, split, filter and statistics; under a softcap only a label apart.
    fast = not any(flags[2:5]) and not flags[7] and not (flags[1] and (flags[5] or flags[8] or flags[11]))
    if tma and fast and hopper_fits(e, made_for):
        from .hopper_dz import launch_dz

        launch_dz(problem, e, run, dz, dz_low, terms, outputs, config.group)
        return
    units = cdiv(rows, config.m) * cdiv(width, config.n)
    chosen = None if outputs.chosen is None else units_of(outputs.chosen, config.group)
    unused = terms.terms
    dz_kernel[(min(units, multiprocessors(e.device)),)](
        operand(e, [config.m, config.k], tma),
        operand(run.c, [config.n, config.k], tma),
        run.bias if run.bias is not None else unused,
        run.weight if weighted else unused,
        terms.targets,
        terms.terms,
        terms.label,
        operand(dz, tile, tma),
        operand(dz if dz_low is None else dz_low, tile, tma),
        unused if alive is None else alive,
        unused if sums is None else sums,
        unused if row_stats is None else row_stats,
        unused if chosen is None else chosen,
        unused if outputs.active is None else outputs.active,
        (rows, width, problem.d, run.start),
        tuple(e.stride()),
        tuple(run.c.stride()),
        tuple(dz.stride()),
        (float(problem.softcap or 1.0), float(problem.temperature), bits),
        M=config.m,
        N=config.n,
        K=config.k,
        GROUP=config.group,
        FLATTEN=config.flatten,
        FLAGS=flags,
        TMA=tma,
        PRECISION=precision_of(run.c),
        DTYPE={torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}[dz.dtype],
        num_warps=config.warps,
        num_stages=config.stages,
    )


def write_powers(
    problem: Problem, e: Tensor, c: Tensor, terms: RowTerms, powers: Tensor, chosen: Tensor | None, stats: Tensor | None
) -> Tensor:
    """powers (N, V) = exp(z - r) with the target's entry 0, for terms with lse = r and alpha = 1. Where hopper_dz.py
    takes the launch, also as runs of columns below each other, see there.

    Returns (2, column tiles, N): the row sums of the unrounded powers and the row maxima of z, by tile. With `chosen`
    (row blocks,), only row blocks where it is not 0 are computed, into `stats` as well.
    """
    config = config_for("dz", c)
    if chosen is not None:
        chosen = chosen[:, None].expand(-1, cdiv(c.shape[0], config.n))
    if stats is None:
        stats = torch.empty((2, cdiv(c.shape[0], config.n), e.shape[0]), dtype=torch.float32, device=e.device)
    _launch(problem, e, Run(0, c, None, None), terms, powers, None, Outputs(None, None, stats, chosen), None, config)
    return stats


def block_rows(c: Tensor) -> int:
    """Tokens in a row block of `write_powers`."""
    return config_for("dz", c).m
