"""The forward pass: the heads of every token in one walk over the vocabulary, nothing larger than (tokens x splits)
written.

One program owns a block of tokens and a split of the vocabulary; its running maximum and sum stay in registers, and a
small second kernel merges the splits. The target's logit is kept apart, so nll = log1p of the odds against it, to a few
ulp however confident a row is. Splits and tiles depend on the vocabulary alone: a token's heads are bitwise the same
whatever else is in the batch.

Sources: online softmax, Milakov and Gimelshein, arXiv 1805.02867; the complement form, Blanchard, Higham and Higham,
doi 10.1093/imanum/draa038.
"""

from __future__ import annotations

import functools
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..problem import Heads, Plan, Problem
from .entry import Tiles, entry
from .launch import Config, cdiv, descriptor_fits, hopper_fits, precision_of, tuned
from .primitives import (
    LN2,
    LOG2E,
    cap,
    decay_of,
    either,
    grouped,
    load_tile,
    log1p,
    multiply_add,
    online_softmax_update,
    reference_of,
    wide,
)
from .record import first_bounds, record_shape, threshold

__all__ = ["forward"]

MOST_SPLITS = 8
_COLUMNS_A_SPLIT = 4096  # below this a split is not worth its prologue
_FIELDS = tl.constexpr(6)  # maximum, sum, entropy sum, smooth offset, smooth sum, best logit
_COMBINE_ROWS = 128


@entry
@triton.jit
def forward_kernel(
    e,  # (N, D) descriptor or pointer
    c,  # (V, D) descriptor or pointer
    bias,  # (V,) or unused
    weight,  # (V,) column weights of the smooth head, or unused
    targets,  # (N,) int64, -1 where ignored
    partial,  # (FIELDS, splits, N) fp32
    place,  # (splits, N) int32 column of the best logit, or unused
    target_logit,  # (N,) fp32, before the temperature
    bounds,  # (N,) fp32 lower bounds of the lse in base 2, raised by the walk; or unused
    record,  # (row blocks, words) int32 zeros, see record.py; or unused
    shape,  # (N, V, D)
    stride_e,
    stride_c,
    splits,
    tiles_a_split,
    softcap,
    scale,  # log2(e) / temperature
    threshold,  # log2 of the probability that the record asks for
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    GROUP: tl.constexpr,
    FLATTEN: tl.constexpr,
    FLAGS: tl.constexpr,  # (bias, softcap, entropy, smooth, weight, argmax, record)
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):
    n, v, d = shape
    BIAS: tl.constexpr = FLAGS[0]
    SOFTCAP: tl.constexpr = FLAGS[1]
    ENTROPY: tl.constexpr = FLAGS[2]
    SMOOTH: tl.constexpr = FLAGS[3]
    WEIGHT: tl.constexpr = FLAGS[4]
    ARGMAX: tl.constexpr = FLAGS[5]
    block, split = grouped(tl.program_id(0), tl.cdiv(n, M), splits, GROUP)
    rows = block * M + tl.arange(0, M)
    inside = rows < n
    target = tl.load(targets + rows, mask=inside, other=-1).to(tl.int32)

    m = tl.full((M,), float("-inf"), tl.float32)
    s = tl.zeros((M,), tl.float32)
    a = tl.zeros((M,), tl.float32)
    offset = tl.zeros((M,), tl.float32)
    smooth = tl.zeros((M,), tl.float32)
    best = tl.full((M,), float("-inf"), tl.float32)
    where_best = tl.zeros((M,), tl.int32)
    first = split * tiles_a_split
    last = tl.minimum(first + tiles_a_split, tl.cdiv(v, N))
    for tile in tl.range(first, last, flatten=FLATTEN):
        acc = tl.zeros((M, N), tl.float32)
        for k in range(0, d, K):
            left = load_tile(e, stride_e, block * M, k, n, d, M, K, TMA)
            right = load_tile(c, stride_c, tile * N, k, v, d, N, K, TMA)
            acc = multiply_add(left, right.T, acc, PRECISION)
        columns = tile * N + tl.arange(0, N)
        if BIAS:
            acc += tl.load(bias + columns, mask=columns < v, other=0).to(tl.float32)[None, :]
        z, _ = cap(acc, softcap, SOFTCAP)
        if SMOOTH:  # sum w (z - offset), so that an offset common to the row cancels first
            if tile == first:
                offset = tl.max(tl.where((columns < v)[None, :], z, float("-inf")), 1)
                offset = tl.where(tl.abs(offset) < float("inf"), offset, 0.0)
            w = tl.where(columns < v, 1.0, 0.0)
            if WEIGHT:
                w = tl.load(weight + columns, mask=columns < v, other=0)
            smooth += tl.sum(tl.where(w[None, :] != 0, (z - offset[:, None]) * w[None, :], 0.0), 1)
        if tile * N + N > v:
            z = tl.where((columns < v)[None, :], z, float("-inf"))
        if ARGMAX:  # NaN counts as largest, as in torch.argmax
            known = tl.where(z == z, z, float("inf"))
            top = tl.max(known, 1)
            at = tl.min(tl.where(known == top[:, None], columns[None, :], 2147483647), 1)
            where_best = tl.where(top > best, at, where_best)
            best = tl.maximum(best, top)
        local = target - tile * N
        hit = (local >= 0) & (local < N)
        if tl.sum(hit.to(tl.int32)) > 0:  # few tiles hold a target
            own = columns[None, :] == target[:, None]
            tl.store(target_logit + rows, tl.sum(tl.where(own, z, 0.0), 1), mask=hit)
            z = tl.where(own, float("-inf"), z)
        if FLAGS[6]:
            lowest = tl.maximum(tl.load(bounds + rows, mask=inside, other=float("inf")), tl.max(z, 1) * scale)
            bit = (columns // 8) % 32
            found = tl.where(z * scale < (lowest + threshold)[:, None], 0, 1 << bit[None, :])
            words = tl.reduce(tl.sum(tl.reshape(found, (M, N // 8, 8)), 1), 0, either)
            at = record + wide(block) * (tl.cdiv(v, 256) * 8) + tile * N // 256 * 8 + tl.arange(0, 8)
            tl.atomic_or(at, words, mask=words != 0)
        m, s, a = online_softmax_update(m, s, a, z, scale, ENTROPY)
        if FLAGS[6]:
            tl.atomic_max(bounds + rows, m * scale + tl.log2(s), mask=inside)

    step = wide(n) * splits
    out = partial + wide(n) * split + rows
    tl.store(out, m, mask=inside)
    tl.store(out + step, s, mask=inside)
    if ENTROPY:
        tl.store(out + 2 * step, a, mask=inside)
    if SMOOTH:
        tl.store(out + 3 * step, offset, mask=inside)
        tl.store(out + 4 * step, smooth, mask=inside)
    if ARGMAX:
        tl.store(out + 5 * step, best, mask=inside)
        tl.store(place + wide(n) * split + rows, where_best, mask=inside)


@entry
@triton.jit
def combine_kernel(
    partial,  # (FIELDS, splits, N) fp32
    place,  # (splits, N) int32 or unused
    split_weight,  # (splits,) sum of the column weights of each split, or unused
    target_logit,  # (N,)
    targets,  # (N,) int64
    nll,
    lse,
    entropy,
    smooth,
    argmax,  # the heads, (N,)
    n,
    splits,
    scale,
    temperature,
    M: tl.constexpr,
    FLAGS: tl.constexpr,
):
    ENTROPY: tl.constexpr = FLAGS[2]
    SMOOTH: tl.constexpr = FLAGS[3]
    ARGMAX: tl.constexpr = FLAGS[5]
    rows = tl.program_id(0) * M + tl.arange(0, M)
    inside = rows < n
    counts = tl.load(targets + rows, mask=inside, other=-1) >= 0
    step = wide(n) * splits
    m = tl.full((M,), float("-inf"), tl.float32)
    s = tl.zeros((M,), tl.float32)
    a = tl.zeros((M,), tl.float32)
    best = tl.full((M,), float("-inf"), tl.float32)
    where_best = tl.zeros((M,), tl.int32)
    for split in range(splits):
        source = partial + wide(n) * split + rows
        m_other = tl.load(source, mask=inside, other=float("-inf"))
        s_other = tl.load(source + step, mask=inside, other=0.0)
        top = tl.maximum(m, m_other)
        reference = reference_of(top, scale)
        decay, decay_other = decay_of(m, top, scale), decay_of(m_other, top, scale)
        if ENTROPY:
            a_other = tl.load(source + 2 * step, mask=inside, other=0.0)
            gap = reference - reference_of(m, scale)
            gap_other = reference - reference_of(m_other, scale)
            a = decay * (a + s * gap) + decay_other * (a_other + s_other * gap_other)
        s = decay * s + decay_other * s_other
        m = top
        if ARGMAX:
            value = tl.load(source + 5 * step, mask=inside, other=float("-inf"))
            at = tl.load(place + wide(n) * split + rows, mask=inside, other=0)
            where_best = tl.where(value > best, at, where_best)
            best = tl.maximum(best, value)

    # In base 2 relative to the reference: y_t, the target's logit, rounded once; rest, the log of the other columns'
    # sum.
    own = tl.load(target_logit + rows, mask=inside & counts, other=0.0)
    reference = reference_of(m, scale)
    y_t = tl.fma(own, scale, -reference)
    rest = tl.log2(s)
    gap = (rest - y_t) * LN2
    tail = log1p(tl.exp2(-tl.abs(gap) * LOG2E))
    out_nll = tl.maximum(gap, 0.0) + tail
    finite = tl.where(m == float("-inf"), 0.0, m)
    rounding = tl.fma(finite, scale, -reference)  # what the reference lost
    out_lse = tl.where(gap > 0, finite / temperature + (rest - rounding) * LN2, own / temperature) + tail
    tl.store(nll + rows, tl.where(counts, out_nll, 0.0), mask=inside)
    tl.store(lse + rows, tl.where(counts, out_lse, 0.0), mask=inside)
    if ENTROPY:
        alone = m == float("-inf")  # no other column has a probability
        up = tl.where(alone, y_t, tl.maximum(y_t, 0.0))  # the larger of both references, relative to m
        p_t = tl.exp2(y_t - up)
        decay = tl.where(alone, 0.0, tl.exp2(-up))
        total = decay * s + p_t
        below = decay * (a + s * up) + p_t * tl.where(p_t > 0, up - y_t, 0.0)
        tl.store(entropy + rows, tl.where(counts, (tl.log2(total) + below / total) * LN2, 0.0), mask=inside)
    if SMOOTH:
        total = tl.zeros((M,), tl.float32)
        for split in range(splits):
            source = partial + wide(n) * split + rows
            offset = tl.load(source + 3 * step, mask=inside, other=0.0) / temperature
            weighted = tl.load(source + 4 * step, mask=inside, other=0.0) / temperature
            total += tl.load(split_weight + split) * (out_lse - offset) - weighted
        tl.store(smooth + rows, tl.where(counts, total, 0.0), mask=inside)
    if ARGMAX:
        tl.store(argmax + rows, tl.where(counts, where_best, 0).to(tl.int64), mask=inside)


def splits_of(v: int, columns_a_tile: int) -> tuple[int, int]:
    """(splits, tiles a split) of a vocabulary: a function of V and the pinned tile alone."""
    tiles = -(-v // columns_a_tile)
    splits = max(1, min(MOST_SPLITS, -(-v // _COLUMNS_A_SPLIT)))
    tiles_a_split = -(-tiles // splits)
    return -(-tiles // tiles_a_split), tiles_a_split


def operand(x: Tensor, block: list[int], tma: bool) -> Tensor | Tiles:
    """x as a kernel takes it."""
    return Tiles(x, (block[0], block[1])) if tma else x


def flags_of(problem: Problem, plan: Plan) -> tuple[bool, ...]:
    weighted = plan.want_smooth and problem.column_weight is not None
    return (
        problem.bias is not None,
        problem.softcap is not None,
        plan.want_entropy,
        plan.want_smooth,
        weighted,
        plan.want_argmax,
    )


def forward(problem: Problem, plan: Plan) -> tuple[Heads, Tensor]:
    """The heads of `problem`, fp32, and the record of record.py; what the plan does not ask for is empty. No host
    synchronisation.
    """
    n, device = problem.n, problem.e.device
    new = functools.partial(torch.empty, device=device, dtype=torch.float32)
    nll, lse = new(n), new(n)
    entropy, smooth = new(n if plan.want_entropy else 0), new(n if plan.want_smooth else 0)
    argmax = torch.empty(n if plan.want_argmax else 0, dtype=torch.int64, device=device)
    heads = Heads(nll, lse, entropy, smooth, argmax)
    record = torch.zeros(record_shape(problem, plan), dtype=torch.int32, device=device)
    if n == 0:
        return heads, record
    config = tuned("forward", problem.c, lambda candidate: _launch(problem, plan, heads, record[:0], candidate))
    _launch(problem, plan, heads, record, config)
    return heads, record


def _launch(problem: Problem, plan: Plan, heads: Heads, record: Tensor, config: Config) -> None:
    e, c, bias, weight = problem.e, problem.c, problem.bias, problem.column_weight
    n, v, d = problem.n, problem.v, problem.d
    flags = (*flags_of(problem, plan), record.numel() > 0)
    splits, tiles_a_split = splits_of(v, config.n)
    fields = 6 if plan.want_argmax else 5 if plan.want_smooth else 3 if plan.want_entropy else 2
    partial = torch.empty((fields, splits, n), dtype=torch.float32, device=e.device)
    place = torch.empty((splits, n) if plan.want_argmax else (0,), dtype=torch.int32, device=e.device)
    target_logit = torch.empty(n, dtype=torch.float32, device=e.device)
    tma = descriptor_fits(e) and descriptor_fits(c)
    scale = math.log2(math.e) / problem.temperature
    split_weight = place
    if plan.want_smooth:
        width = tiles_a_split * config.n
        ones = torch.ones(v, dtype=torch.float32, device=e.device) if weight is None else weight.to(torch.float32)
        split_weight = torch.nn.functional.pad(ones, (0, splits * width - v)).view(splits, width).sum(1)
    bounds = first_bounds(problem, scale) if record.numel() else target_logit
    if not any(flags[2:6]) and tma and hopper_fits(e, config.hopper):
        from .hopper import launch_forward

        outputs = (partial, target_logit, bounds, record)
        launch_forward(problem, outputs, tiles_a_split, scale, threshold(problem, plan), config.group)
    else:
        forward_kernel[(cdiv(n, config.m) * splits,)](
            operand(e, [config.m, config.k], tma),
            operand(c, [config.n, config.k], tma),
            bias if bias is not None else partial,
            weight if flags[4] else partial,
            problem.targets,
            partial,
            place,
            target_logit,
            bounds,
            record if record.numel() else place,
            (n, v, d),
            tuple(e.stride()),
            tuple(c.stride()),
            splits,
            tiles_a_split,
            float(problem.softcap or 1.0),
            scale,
            threshold(problem, plan),
            M=config.m,
            N=config.n,
            K=config.k,
            GROUP=config.group,
            FLATTEN=config.flatten,
            FLAGS=flags,
            TMA=tma,
            PRECISION=precision_of(c),
            num_warps=config.warps,
            num_stages=config.stages,
        )
    combine_kernel[(cdiv(n, _COMBINE_ROWS),)](
        partial,
        place,
        split_weight,
        target_logit,
        problem.targets,
        *heads,
        n,
        splits,
        scale,
        float(problem.temperature),
        M=_COMBINE_ROWS,
        FLAGS=flags,
        num_warps=4,
    )
