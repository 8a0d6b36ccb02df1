"""Where the gradient lives: which blocks of 16 columns may hold an entry that an element filter keeps, for every token.

The forward pass sees every logit. It compares each with the filter's threshold times a lower bound of its row's
exp(lse): the largest of the target's logit, the log-sum-exp of the first columns (which tokenizers give to frequent
tokens), that of the columns that the program itself has walked, and for a subset filter log V plus the row's mean logit
(Jensen). That can only keep too much, and it is the same whatever else runs, so results are bitwise repeatable. One bit
a block is left, and one for the target's block; the definition alone, with the final lse, decides later (entries.py).
Where no record was left, the same walk with the final lse makes it.

With more hits than the backward pass has room for nothing is gained by looking for the rest: the programs count what
they find together, and once there are more, what they still walk is recorded as hit throughout. When they come to know
of it depends on what runs beside; that there are too many does not.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..numerics import Filter, FilterKind, Variant
from ..problem import Heads, Plan, Problem
from .elements import seed_words
from .entry import entry
from .heads import combine_kernel, operand, splits_of
from .heads import forward as forward_heads
from .launch import cdiv, config_for, descriptor_fits, hopper_fits, precision_of
from .primitives import (
    BEYOND,
    INTERPRETED,
    cap,
    column_word,
    grouped,
    load_tile,
    multiply_add,
    online_softmax_update,
    reference_of,
    row_word,
    stirred,
    wide,
)
from .record import SLACK, first_bounds

__all__ = ["BLOCK", "forward", "found_again", "kept_filter", "leaves_record", "record_shape", "words_of"]

BLOCK = 16  # columns
FIRST_COLUMNS = 2048  # whose log-sum-exp is known before the walk
EVERY_THREAD = tl.constexpr(512)  # at least the threads of a program, a power of two
_COMBINE_ROWS = 128


def kept_filter(problem: Problem, plan: Plan) -> Filter | None:
    """The filter whose kept entries (for subsets: those above eps) are sparse on both sides; None where there is none.

    Both sides must have the same one: the sparse pass computes each entry once.
    """
    filt = plan.variant.filter_e
    return filt if plan.variant.by_element and filt.threshold(problem.operand_dtype) > 0 else None


def leaves_record(problem: Problem, plan: Plan) -> bool:
    """Whether the forward pass leaves a record: a backward pass may follow, and no head beside nll is asked for."""
    heads = plan.want_entropy or plan.want_smooth or plan.want_argmax
    return plan.want_record and not heads and problem.n > 0 and kept_filter(problem, plan) is not None


def record_shape(problem: Problem, plan: Plan) -> tuple[int, int]:
    """Shape of the int32 record of the forward pass: (1, words of 32 bits), or (0, 0) where it leaves none."""
    if not leaves_record(problem, plan):
        return 0, 0
    return 1, -(-_tiles(problem) * problem.n // 2)


def _tiles(problem: Problem) -> int:
    return -(-problem.v // config_for("forward", problem.c).n)


def words_of(problem: Problem, record: Tensor) -> Tensor:
    """The record as (column tiles, N) int16: bit b of a word is the block b of that tile's columns."""
    tiles = _tiles(problem)
    return record.view(torch.int16).reshape(-1)[: tiles * problem.n].view(tiles, problem.n)


@triton.jit
def block_bits(x, lowest, scale, M: tl.constexpr, N: tl.constexpr):
    """(M,) int32: bit b is whether some scale x (M, N) of the block b of columns, -inf aside, reaches `lowest`.

    One comparison, in one layout: Triton 3.6 mixes up rows where it moves booleans of these blocks between layouts.
    """
    top = tl.max(tl.reshape(x, (M, N // 16, 16)), 2) * scale
    found = top >= tl.maximum(lowest, -3.0e38)
    return tl.sum(found.to(tl.int32) << tl.arange(0, N // 16)[None, :], 1)


@triton.jit
def beyond(p, limit, by_row, by_column):
    """p - limit u for uniform draws u of the words stirred(by_row ^ by_column), or up to 2^-15 less."""
    if INTERPRETED:
        return p - limit * ((stirred(by_row ^ by_column) >> 16).to(tl.float32) * 1.52587890625e-05)
    else:
        return tl.inline_asm_elementwise(
            BEYOND, "=f,r,r,f,f", [by_row, by_column, p, limit], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def drawn_bits(p, limit, by_row, first, M: tl.constexpr, N: tl.constexpr):
    """(M,) int32: bit b is whether some p (M, N) of the block b reaches limit (M,) times the draw of its column, of
    first to first + N; by halves, for the sake of registers.
    """
    if N > 64:
        left, right = tl.split(tl.permute(tl.reshape(p, (M, 2, N // 2)), (0, 2, 1)))
        bits = drawn_bits(left, limit, by_row, first, M, N // 2)
        return bits | (drawn_bits(right, limit, by_row, first + N // 2, M, N // 2) << (N // 32))
    else:
        by_column = column_word((first + tl.arange(0, N)).to(tl.uint32))
        x = beyond(p, limit[:, None], by_row[:, None], by_column[None, :])
        return block_bits(x, 1.0e-37, 1.0, M, N)


@triton.jit
def how_many(words):
    """How many of the low 16 bits of words are set."""
    words -= (words >> 1) & 0x5555
    words = (words & 0x3333) + ((words >> 2) & 0x3333)
    words = (words + (words >> 4)) & 0x0F0F
    return (words + (words >> 8)) & 31


@entry
@triton.jit
def hits_kernel(
    e,  # (N, D) descriptor or pointer
    c,  # (V, D) descriptor or pointer
    bias,  # (V,) or unused
    targets,  # (N,) int64, -1 where ignored
    bounds,  # (N,) fp32 in base 2: lower bounds of the lse, or the lse itself
    partial,  # (2, splits, N) fp32 maximum and sum of the forward pass, or unused
    target_logit,  # (N,) fp32, before the temperature, or unused
    record,  # (column tiles, N) int16
    hits,  # () int32: those found so far beyond what there is room for, in and out; or unused
    seed,  # () int64
    shape,  # (N, V, D, number of the first column in the whole vocabulary)
    stride_e,
    stride_c,
    splits,
    tiles_a_split,
    scalars,  # (softcap, log2(e) / temperature, log2 of the threshold)
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    GROUP: tl.constexpr,
    FLATTEN: tl.constexpr,
    FLAGS: tl.constexpr,  # (bias, softcap, forward, drawn)
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):
    n, v, d, first_id = shape
    softcap, scale, log_eps = scalars
    block, split = grouped(tl.program_id(0), tl.cdiv(n, M), splits, GROUP)
    rows = block * M + tl.arange(0, M)
    inside = rows < n
    target = tl.load(targets + rows, mask=inside, other=-1).to(tl.int32)
    known = tl.load(bounds + rows, mask=inside, other=0.0)
    m = tl.full((M,), float("-inf"), tl.float32)
    s = tl.zeros((M,), tl.float32)
    first = split * tiles_a_split
    last = tl.minimum(first + tiles_a_split, tl.cdiv(v, N))
    for tile in tl.range(first, last, flatten=FLATTEN):
        if FLAGS[2]:
            beyond_room = tl.load(hits + tl.zeros((EVERY_THREAD,), tl.int32), volatile=True)
        acc = tl.zeros((M, N), tl.float32)
        for k in range(0, d, K):
            left = load_tile(e, stride_e, block * M, k, n, d, M, K, TMA)
            right = load_tile(c, stride_c, tile * N, k, v, d, N, K, TMA)
            acc = multiply_add(left, right.T, acc, PRECISION)
        columns = tile * N + tl.arange(0, N)
        if FLAGS[0]:
            acc += tl.load(bias + columns, mask=columns < v, other=0).to(tl.float32)[None, :]
        z, _ = cap(acc, softcap, FLAGS[1])
        if tile * N + N > v:
            z = tl.where((columns < v)[None, :], z, float("-inf"))
        local = target - tile * N
        hit = (local >= 0) & (local < N)
        lowest = known + log_eps
        full = False
        if FLAGS[2]:  # threads that read at different times must not go different ways: one answer for all of them
            full = tl.max(beyond_room, 0) > 0
        if FLAGS[2]:
            if tl.sum(hit.to(tl.int32)) > 0:  # few tiles hold a target
                own = columns[None, :] == target[:, None]
                tl.store(target_logit + rows, tl.sum(tl.where(own, z, 0.0), 1), mask=hit)
                z = tl.where(own, float("-inf"), z)
            m, s, _ = online_softmax_update(m, s, s, z, scale, False)
            lowest = tl.maximum(known, m * scale + tl.log2(s)) + log_eps
        if full:
            bits = tl.full((M,), 1, tl.int32) * ((1 << tl.minimum(tl.cdiv(v - tile * N, 16), N // 16)) - 1)
        else:
            if FLAGS[3]:
                low, high = seed_words(seed)
                by_row = row_word(low, high, rows.to(tl.uint32))
                reference = reference_of(m, scale) if FLAGS[2] else known
                p = tl.exp2(z * scale - reference[:, None])  # those of the softmax's update, where there is one
                limit = tl.exp2(tl.minimum(lowest - reference, 120.0))  # no p reaches 2^120 u
                bits = drawn_bits(p, limit, by_row, first_id + tile * N, M, N)
            else:
                bits = block_bits(z, lowest[:, None], scale, M, N)
            bits |= tl.where(hit, 1 << (tl.where(hit, local, 0) // 16), 0)
            if FLAGS[2]:
                tl.atomic_add(hits, tl.sum(tl.where(target >= 0, how_many(bits), 0), 0), sem="relaxed")
        tl.store(record + wide(n) * tile + rows, tl.where(target >= 0, bits, 0).to(tl.int16), mask=inside)
    if FLAGS[2]:
        out = partial + wide(n) * split + rows
        tl.store(out, m, mask=inside)
        tl.store(out + wide(n) * splits, s, mask=inside)


def _launch(
    problem: Problem,
    filt: Filter,
    seed: Tensor,
    bounds: Tensor,  # (N,) in base 2
    record: Tensor,  # (column tiles, N) int16
    outputs: tuple[Tensor, Tensor, Tensor] | None,  # partial, target_logit and count of hits of the forward pass
) -> None:
    e, c, bias, n, v = problem.e, problem.c, problem.bias, problem.n, problem.v
    config = config_for("forward", c)
    splits, tiles_a_split = splits_of(v, config.n)
    tma = descriptor_fits(e) and descriptor_fits(c)
    eps, drawn = filt.threshold(problem.operand_dtype), filt.kind is FilterKind.STOCHASTIC
    scalars = (float(problem.softcap or 1.0), math.log2(math.e) / problem.temperature, math.log2(eps) - SLACK)
    if outputs is not None and tma and hopper_fits(e, config.hopper):
        from .hopper_hits import launch_hits

        launch_hits(problem, drawn, seed, bounds, record, outputs, (splits, tiles_a_split), scalars, config.group)
        return
    partial, target_logit, hits = (bounds, bounds, seed) if outputs is None else outputs
    hits_kernel[(cdiv(n, config.m) * splits,)](
        operand(e, [config.m, config.k], tma),
        operand(c, [config.n, config.k], tma),
        bounds if bias is None else bias,
        problem.targets,
        bounds,
        partial,
        target_logit,
        record,
        hits,
        seed,
        (n, v, problem.d, problem.first_column),
        tuple(e.stride()),
        tuple(c.stride()),
        splits,
        tiles_a_split,
        scalars,
        M=config.m,
        N=config.n,
        K=config.k,
        GROUP=config.group,
        FLATTEN=config.flatten,
        FLAGS=(bias is not None, problem.softcap is not None, outputs is not None, drawn),
        TMA=tma,
        PRECISION=precision_of(c),
        num_warps=config.warps,
        num_stages=config.stages,
    )


def forward(problem: Problem, plan: Plan, seed: Tensor, room: int) -> tuple[Heads, Tensor]:
    """nll and lse of every token, and the record of `record_shape`: every hit, or where they are more than `room`, more
    than `room`. Requires `leaves_record`. No host synchronisation.
    """
    filt = kept_filter(problem, plan)
    assert filt is not None
    n, device = problem.n, problem.e.device
    new = functools.partial(torch.empty, dtype=torch.float32, device=device)
    heads = Heads(new(n), new(n), new(0), new(0), torch.empty(0, dtype=torch.int64, device=device))
    record = torch.empty(record_shape(problem, plan), dtype=torch.int32, device=device)
    splits, _ = splits_of(problem.v, config_for("forward", problem.c).n)
    scale = math.log2(math.e) / problem.temperature
    partial, target_logit = new(2, splits, n), new(n)
    outputs = (partial, target_logit, torch.full((), -room, dtype=torch.int32, device=device))
    _launch(problem, filt, seed, _bounds(problem, filt, scale), words_of(problem, record), outputs)
    combine_kernel[(cdiv(n, _COMBINE_ROWS),)](
        partial,
        heads.argmax,
        partial,
        target_logit,
        problem.targets,
        *heads,
        n,
        splits,
        scale,
        float(problem.temperature),
        M=_COMBINE_ROWS,
        FLAGS=(problem.bias is not None, problem.softcap is not None, False, False, False, False),
        num_warps=4,
    )
    return heads, record


def _bounds(problem: Problem, filt: Filter, scale: float) -> Tensor:
    """(N,) lower bounds of the lse in base 2: the target's logit, the log-sum-exp of the first columns, and for a
    subset filter, which alone keeps little of a flat softmax, Jensen's, for which the classifier is read once more.
    """
    bias = problem.bias
    out = first_bounds(problem, scale, filt.kind is FilterKind.SUBSET)
    if problem.v > 2 * FIRST_COLUMNS:
        some = dataclasses.replace(
            problem,
            c=problem.c[:FIRST_COLUMNS],
            bias=None if bias is None else bias[:FIRST_COLUMNS],
            column_weight=None,
            targets=problem.targets.clamp(max=0),  # the lse does not depend on the target
        )
        heads, _ = forward_heads(some, Plan(Variant("lse", "")))
        out = torch.maximum(out, heads.lse * math.log2(math.e))  # inf where ignored stays
    return out


def found_again(problem: Problem, filt: Filter, seed: Tensor, lse: Tensor) -> Tensor:
    """The record as (column tiles, N) int16 words, by one more walk with the final lse (N,)."""
    words = torch.empty((_tiles(problem), problem.n), dtype=torch.int16, device=problem.e.device)
    _launch(problem, filt, seed, lse * math.log2(math.e), words, None)
    return words
