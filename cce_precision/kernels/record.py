"""Which tiles of dZ can survive a tile filter, said by the forward pass, so that the backward computes no others.

The forward pass sees every logit and compares it with eps times a lower bound of its row's exp(lse), which can only
keep too much: the largest of the target's logit, log V plus the row's mean logit (Jensen), and the log-sum-exps of what
the programs of that row have walked so far. Of each 128 tokens and each column it leaves one bit, whether any of the
tokens reached eps there. From the bits follow the tiles in any visiting order; those are computed again, and the
definition alone (dz.py) decides, so that results do not depend on how tight the bounds were.

Bit layout: column j of a row block is bit (j mod 256) div 8 of word 8 (j div 256) + j mod 8.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..problem import Plan, Problem
from .entry import entry
from .launch import cdiv, config_for, next_power_of_2
from .primitives import LOG2E, cap, grouped, wide
from .terms import matvec, weighted_sum

__all__ = ["SLACK", "candidates", "first_bounds", "record_shape", "threshold", "units_of"]

SLACK = 0.0625  # in base 2: a bound and a logit come from different sums, which must not part at eps


def record_shape(problem: Problem, plan: Plan) -> tuple[int, int]:
    """Shape of the forward pass's int32 record: (row blocks, words), or (0, 0) where no backward pass would read it."""
    variant = plan.variant
    if not (plan.want_record and variant.filter_e.by_tile and variant.filter_c.by_tile) or problem.n == 0:
        return 0, 0
    return -(-problem.n // config_for("forward", problem.c).m), 8 * -(-problem.v // 256)


def threshold(problem: Problem, plan: Plan) -> float:
    """log2 of the probability above which the forward pass records a column."""
    eps = plan.variant.filter_e.threshold(problem.operand_dtype)
    return math.log2(eps) - SLACK if eps > 0 else -math.inf


@entry
@triton.jit
def first_bounds_kernel(
    e,  # (N, D)
    c,  # (V, D)
    bias,  # (V,) or unused
    targets,  # (N,) int64
    jensen,  # (N,) fp32 natural lower bounds of the lse, or unused
    bounds,  # (N,) fp32, out: in base 2; inf where ignored
    d,
    stride_e,
    stride_c,
    softcap,
    scale,
    FEATURES: tl.constexpr,
    FLAGS: tl.constexpr,  # (bias, softcap, jensen)
):
    row = tl.program_id(0)
    target = tl.load(targets + row)
    bound = float("inf")
    if target >= 0:
        total = tl.zeros((FEATURES,), tl.float32)
        for k in range(0, d, FEATURES):
            j = k + tl.arange(0, FEATURES).to(tl.int64)
            left = tl.load(e + wide(stride_e[0]) * row + j * stride_e[1], mask=j < d, other=0).to(tl.float32)
            right = tl.load(c + target * stride_c[0] + j * stride_c[1], mask=j < d, other=0).to(tl.float32)
            total += left * right
        y = tl.sum(total, 0)
        if FLAGS[0]:
            y += tl.load(bias + target).to(tl.float32)
        z, _ = cap(y, softcap, FLAGS[1])
        if FLAGS[2]:
            bound = tl.maximum(z * scale, tl.load(jensen + row) * LOG2E)
        else:
            bound = z * scale
    tl.store(bounds + row, bound)


def first_bounds(problem: Problem, scale: float, jensen: bool = True) -> Tensor:
    """(N,) lower bounds of each token's lse in base 2, known before the walk: the target's logit and, if wanted and
    without a softcap, Jensen's bound.
    """
    e, c, bias, v = problem.e, problem.c, problem.bias, problem.v
    jensen = jensen and problem.softcap is None
    mean = e.new_empty(0, dtype=torch.float32)
    if jensen:
        mean = matvec(e, weighted_sum(c, None) / v)
        if bias is not None:
            mean += bias.to(torch.float32).mean()
        mean = mean / problem.temperature + math.log(v)
    out = torch.empty(problem.n, dtype=torch.float32, device=e.device)
    first_bounds_kernel[(problem.n,)](
        e,
        c,
        out if bias is None else bias,
        problem.targets,
        mean if jensen else out,
        out,
        problem.d,
        tuple(e.stride()),
        tuple(c.stride()),
        float(problem.softcap or 1.0),
        scale,
        FEATURES=min(1024, next_power_of_2(problem.d)),
        FLAGS=(bias is not None, problem.softcap is not None, jensen),
    )
    return out


@entry
@triton.jit
def candidates_kernel(
    record,  # (row blocks, words) int32
    order,  # (V,) int64 columns in visiting order, or unused
    packed,  # (N,) int64 tokens in the order of dZ's rows
    targets,  # (N,) int64 by dZ's rows, -1 where ignored
    lse,  # (N,) fp32 by dZ's rows
    alive,  # (runs, row blocks x column tiles of a run) int32, out
    shape,  # (N, V, columns of a run)
    words,
    stride,
    HEIGHT: tl.constexpr,  # tokens of a row block of the record
    TM: tl.constexpr,
    TN: tl.constexpr,
    ORDER: tl.constexpr,
):
    n, v, width = shape
    block, tile, start = tl.program_id(0), tl.program_id(1), tl.program_id(2) * width
    stop = tl.minimum(start + width, v)
    rows = block * TM + tl.arange(0, TM)
    inside = rows < n
    counts = tl.load(targets + rows, mask=inside, other=-1) >= 0
    value = tl.load(lse + rows, mask=inside, other=0.0)
    source = tl.load(packed + rows, mask=inside, other=0)
    first = tl.min(tl.where(counts, source, 9223372036854775807), 0) // HEIGHT
    last = tl.max(tl.where(counts, source, -1), 0) // HEIGHT
    columns = start + tile * TN + tl.arange(0, TN)
    known = columns < stop
    j = columns.to(tl.int64)
    if ORDER:
        j = tl.load(order + columns, mask=known, other=0)
    found = tl.zeros((TN,), tl.int32)
    for from_block in range(first.to(tl.int32), last.to(tl.int32) + 1):
        word = tl.load(record + wide(words) * from_block + (j // 256) * 8 + j % 8, mask=known, other=0)
        found |= (word >> ((j % 256) // 8).to(tl.int32)) & 1
    broken = tl.max((value != value).to(tl.int32), 0)  # NaN survives everywhere in its row
    tiles = tl.cdiv(stop - start, TN)
    out = alive + wide(stride) * tl.program_id(2) + block * tiles + tile
    tl.store(out, tl.maximum(tl.max(found, 0), broken), mask=tile < tiles)


def candidates(
    record: Tensor,
    problem: Problem,
    order: Tensor | None,  # (V,) columns in visiting order; None: 0, 1, ...
    width: int,  # columns of a run
    packed: Tensor,  # (N,) int64: the token of each row of dZ
    lse: Tensor,  # (N,) by rows of dZ
    targets: Tensor,  # (N,) int64 positions in visiting order, by rows of dZ
    tile: tuple[int, int],
) -> list[Tensor]:
    """For each run a (row blocks, column tiles) int32 matrix: 1 where a tile of dZ may survive, or holds a target."""
    n, v, (tm, tn) = lse.shape[0], problem.v, tile
    runs, blocks, most = cdiv(v, width), cdiv(n, tm), cdiv(width, tn)
    stride = blocks * most + 1  # the last entry of a run is spare
    alive = torch.empty((runs, stride), dtype=torch.int32, device=record.device)
    candidates_kernel[(blocks, most, runs)](
        record,
        packed if order is None else order,
        packed,
        targets,
        lse,
        alive,
        (n, v, width),
        record.shape[1],
        stride,
        HEIGHT=config_for("forward", problem.c).m,
        TM=tm,
        TN=tn,
        ORDER=order is not None,
    )
    run = targets.clamp(0, v - 1) // width
    tiles = ((v - run * width).clamp(max=width) + tn - 1) // tn
    place = torch.arange(n, device=record.device) // tm * tiles + (targets - run * width) // tn
    here = (targets >= 0) & (targets < v)
    alive.view(-1).scatter_(0, run * stride + torch.where(here, place, stride - 1), 1)
    widths = [min(width, v - start) for start in range(0, v, width)]
    return [row[: blocks * cdiv(w, tn)].view(blocks, -1) for row, w in zip(alive, widths)]


@entry
@triton.jit
def units_kernel(
    alive,  # (row blocks, column tiles) int32, by strides
    units,  # (1 + blocks x tiles,) int32, out
    blocks,
    tiles,
    columns,
    stride_block,
    stride_tile,
    GROUP: tl.constexpr,
    PAIR: tl.constexpr,
    CHUNK: tl.constexpr,
):
    count = tl.zeros((), tl.int32)
    for first in range(0, blocks * tiles, CHUNK):
        unit = first + tl.arange(0, CHUNK)
        block, tile = grouped(unit, blocks, tiles, GROUP)
        flag = tl.zeros((CHUNK,), tl.int32)
        for i in tl.static_range(PAIR):
            column = tile * PAIR + i
            inside = (unit < blocks * tiles) & (column < columns)
            value = tl.load(alive + block * stride_block + column * stride_tile, mask=inside, other=0)
            flag |= (value != 0).to(tl.int32)
        rank = count + tl.cumsum(flag, 0) - flag
        tl.store(units + 1 + rank, block * tiles + tile, mask=flag != 0)
        count += tl.sum(flag, 0)
    tl.store(units, count)


def units_of(alive: Tensor, group: int, pair: int = 1) -> Tensor:
    """How many units of dZ to compute, and then which, as row block x units of a row + unit: (1 + units,) int32.

    alive: (row blocks, column tiles) int32, not 0: needed. A unit is `pair` column tiles; they come in the order of the
    walk in which `group` row blocks share a column tile.
    """
    blocks, columns = alive.shape
    tiles = -(-columns // pair)
    units = torch.empty(1 + blocks * tiles, dtype=torch.int32, device=alive.device)
    units_kernel[(1,)](
        alive, units, blocks, tiles, columns, *alive.stride(), GROUP=group, PAIR=pair, CHUNK=1024, num_warps=8
    )  # fmt: skip
    return units
