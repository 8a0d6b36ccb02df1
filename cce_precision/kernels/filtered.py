"""The backward pass of variants whose filters work on single entries.

`sparse`, where both sides have one filter: dZ is a sparse matrix (entries.py, sparse.py), and below the threshold a
subset filter adds two small dense products (subsets.py). Where the hits are more than the workspace holds, as on a flat
softmax, the device itself takes the exact dense way instead (exact.py). The host launches both, but for what it knows
by then not to count (answer.py), and waits for neither. `dense`, for all other filters: library products of each side's
dZ.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from ..numerics import Filter, FilterKind
from ..problem import Heads, Plan, Problem, Upstream, is_centred
from ..promise import filter_error
from .answer import Answer, met_before
from .dense import accumulate_product, no_tokens
from .elements import COLUMNS, ROWS, ElementFilter, write_filtered
from .entries import Buffers, Entries, entries_of, seen_of
from .exact import NARROWEST, exact_where, least_pool, room_for
from .hits import BLOCK, found_again, kept_filter, words_of
from .lists import counts_of, lists_of
from .row_terms import row_terms
from .schedule import WIDEST
from .sparse import finish_blocks, finish_rows
from .subsets import Tail, members, tail_of
from .terms import (
    RowTerms,
    TokensByTarget,
    clean_rows,
    finish_bias,
    finish_columns,
    label_rows,
    scale_into,
    weighted_sum,
)

__all__ = ["backward_filtered", "capacity", "occupancy"]

DEFAULT_WORKSPACE_MB = 80  # with the record at N = 8192, V = 256000 less than 128 MB
MOST_HITS = 2**26  # entries are numbered by int32
WORTH_IT = 16  # blocks for each hit: with more hits the exact way is the faster one (on an H200 from some 13 on)

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]


def backward_filtered(
    problem: Problem,
    plan: Plan,
    heads: Heads,
    upstream: Upstream,
    need: tuple[bool, bool, bool],
    seed: Tensor,
    record: Tensor | None = None,
) -> Gradients:
    """(dE, dC, dbias) in the dtypes of e (fp32 for plan.partial_e), c and bias; None where not needed."""
    if problem.n == 0:
        return no_tokens(problem, plan, need)
    terms = row_terms(problem, plan, heads, upstream, problem.targets)
    if kept_filter(problem, plan) is None:
        return dense(problem, plan, clean_rows(problem), terms, need, seed)
    return sparse(problem, plan, heads, terms, need, seed, record)


def side_filter(
    problem: Problem, plan: Plan, e: Tensor, filt: Filter, seed: Tensor, over_columns: bool
) -> ElementFilter:
    """The filter of dE (over_columns) or dC, subsets as factors of the columns or of the tokens."""
    if filt.kind is not FilterKind.SUBSET:
        return ElementFilter.of(filt, problem.operand_dtype, seed)
    places = members(problem, plan, e, filt, seed, over_columns)
    size = problem.v if over_columns else problem.n
    factor = torch.zeros(size + 1, dtype=torch.float32, device=e.device)  # the last: a spare entry
    factor.scatter_(0, torch.where(places >= 0, places, size), float(filt.share))
    return ElementFilter(COLUMNS if over_columns else ROWS, filt.threshold(problem.operand_dtype), seed, factor[:size])


@dataclass(frozen=True)
class Workspace:
    """The workspace of a sparse pass. What the exact way needs lies over all of it: only one of the two counts."""

    pool: Tensor  # fp32, all of it
    buffers: Buffers
    tail: Tensor  # uint8: for runs of a subset filter's tail, over the lists by token, which dE alone needs

    @staticmethod
    def of(problem: Problem, plan: Plan) -> Workspace:
        pool = torch.empty(pool_size(problem, plan) // 4, dtype=torch.float32, device=problem.e.device)
        hits, entries = held(problem, plan)
        start = Buffers.by_token(hits, entries)
        return Workspace(pool, Buffers.of(pool, hits, entries), pool.view(torch.uint8)[-(-start // 256) * 256 :])


def pool_size(problem: Problem, plan: Plan) -> int:
    """Bytes of the workspace, a multiple of 256: what the caller allows, or what the exact way needs at least."""
    megabytes = DEFAULT_WORKSPACE_MB if plan.workspace_mb is None else plan.workspace_mb
    return -(-max(megabytes * 2**20, least_pool(problem)) // 256) * 256


def capacities(n: int, blocks: int, size: int) -> tuple[int, int]:
    """(hits, kept entries) that `size` bytes hold, at one and a half entries a hit; at most all that there can be, and
    beyond what the default workspace holds no more than are worth their while.
    """
    every, a_hit = n * blocks, Buffers.A_HIT + Buffers.AN_ENTRY * 3 // 2
    if every * (Buffers.A_HIT + BLOCK * Buffers.AN_ENTRY) + 4 <= size:
        return every, every * BLOCK
    most = max(every // WORTH_IT, DEFAULT_WORKSPACE_MB * 2**20 // a_hit)
    hits = min(every, (size - 4) // a_hit, most, MOST_HITS)
    return hits, hits * 3 // 2


def words_for(problem: Problem, filt: Filter, seed: Tensor, lse: Tensor, record: Tensor | None) -> Tensor:
    """The hits as words (column tiles, N): from the forward pass, or found again."""
    if record is not None and record.numel() > 0:
        return words_of(problem, record)
    return found_again(problem, filt, seed, lse)


def held(problem: Problem, plan: Plan) -> tuple[int, int]:
    """(hits, kept entries) that the workspace holds."""
    return capacities(problem.n, -(-problem.v // BLOCK), pool_size(problem, plan))


def capacity(problem: Problem, plan: Plan) -> int:
    """How many hits the workspace holds. With more of them a sparse pass takes the exact dense way."""
    return held(problem, plan)[0]


def occupancy(problem: Problem, plan: Plan, lse: Tensor, seed: Tensor, record: Tensor | None) -> Tensor:
    """How many hits there are, 0-dim int64; capacity + 1 where they are more than the capacity. Requires `kept_filter`;
    lse (N,) as in the heads.
    """
    filt = kept_filter(problem, plan)
    assert filt is not None
    lse = torch.where(problem.targets >= 0, lse, torch.inf)
    by_block, _ = counts_of(words_for(problem, filt, seed, lse, record), problem.c, lse)
    return by_block.sum(dtype=torch.int64).clamp(max=capacity(problem, plan) + 1)


def sparse(
    problem: Problem,
    plan: Plan,
    heads: Heads,
    terms: RowTerms,
    need: tuple[bool, bool, bool],
    seed: Tensor,
    record: Tensor | None,
) -> Gradients:
    """The kept entries as a sparse matrix, the tail of a subset filter by small dense products; or the exact gradient,
    where the entries do not fit or their filter cannot keep plan.tolerance.
    """
    need_e, need_c, need_bias = need
    n, v, d, device, filt = problem.n, problem.v, problem.d, problem.e.device, plan.variant.filter_e
    e = problem.e.contiguous()  # ignored rows stand in no list
    workspace = Workspace.of(problem, plan)
    buffers, lse = workspace.buffers, terms.terms[0]
    words = words_for(problem, filt, seed, lse, record)
    kept = ElementFilter.of(filt, problem.operand_dtype, seed)
    lists = lists_of(words, problem.c, lse, buffers.tokens, buffers.blocks)
    del words
    entries = entries_of(problem, e, terms, kept, lists, buffers, need_e and is_centred(problem, plan))
    centre = None if entries.counts is None else centres(problem, entries.counts)
    heads_wanted = terms.entropy, terms.smooth_apart, problem.softcap is None, problem.bias is None
    asked = met_before((device, n % 16 == 0, v, d, e.dtype, need, plan.variant, plan.tolerance is None, *heads_wanted))
    dense_way = Answer(entries.dense, asked)
    segments = TokensByTarget.of(problem.targets, v)
    shift_c = weighted_sum(e, terms.sigma) if terms.smooth_apart and need_c else None
    shift_e = weighted_sum(problem.c, problem.column_weight) if terms.smooth_apart and need_e else None
    d_e = torch.empty((n, d), dtype=torch.float32 if plan.partial_e else e.dtype, device=device) if need_e else None
    d_c = torch.empty((v, d), dtype=problem.c.dtype, device=device) if need_c else None
    d_bias = torch.empty(v, dtype=torch.float32, device=device) if need_bias else None
    tail = None
    if filt.kind is FilterKind.SUBSET:
        tail = tail_of(problem, plan, e, terms, filt, seed, entries.dense, centre)
    if d_e is not None:
        base, excess = (None, None) if tail is None else tail_of_rows(problem, terms, tail, shift_e, d_c)
        finish_rows(problem, terms, entries, d_e, base, shift_e, centre, excess)
        del base
    seen = None if plan.tolerance is None else seen_of(problem, terms, entries, kept, heads.nll, centre)
    if tail is not None and (need_c or need_bias):
        tail_by_runs(problem, e, terms, segments, entries, tail, workspace.tail, d_c, d_bias, shift_c, dense_way)
    elif need_c or need_bias:
        finish_blocks(problem, e, terms, segments, entries, d_c, d_bias, shift_c)
    if seen is not None and plan.tolerance is not None and (need_e or need_c):
        if tail is not None and tail.energies is not None:
            seen = dataclasses.replace(seen, energy_e=tail.energies[0], energy_c=tail.energies[1])
        broken = ~(filter_error(problem, filt, seen, terms.scale, (d_e, d_c)) <= plan.tolerance)
        dense_way = Answer(torch.maximum(dense_way.flag, broken.to(torch.int32)), asked)
    if plan.tolerance is not None or buffers.values.numel() < n * -(-v // BLOCK) * BLOCK:
        exact_where(problem, terms, segments, workspace.pool, d_e, d_c, d_bias, shift_e, shift_c, dense_way)
    return d_e, d_c, finish_bias(problem, terms, d_bias)


def centres(problem: Problem, counts: Tensor) -> Tensor:
    """(2, D) fp32: what even and odd tokens take from the rows of c in dE, the mean row of the entries of the others
    that are counted by column (2, V); 0 where there are none.
    """
    return (weighted_sum(problem.c, counts) / counts.sum(1, keepdim=True).clamp(min=1)).flip(0)


def tail_of_rows(
    problem: Problem, terms: RowTerms, tail: Tail, shift: Tensor | None, d_c: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """(N, D) fp32: the target's terms of dE and the tail, where d_c has room in d_c, which is not yet written; and what
    `Tail.add_to_rows` returns.
    """
    n, d, dtype = problem.n, problem.d, problem.operand_dtype
    sums, column = -(-n * d // 64) * 256, (n + d) * dtype.itemsize
    widest = min(WIDEST, -(-tail.columns_drawn.numel() // 8) * 8)
    narrowest = min(widest, NARROWEST)
    room = None if d_c is None else d_c.view(-1).view(torch.uint8)
    width = 0 if room is None else min(widest, (room.numel() - sums) // column // 8 * 8)
    if room is None or width < narrowest:
        width = narrowest
        room = torch.empty(sums + width * column, dtype=torch.uint8, device=problem.e.device)
    total = label_rows(problem, terms, shift, room[:sums].view(torch.float32)[: n * d].view(n, d))
    dz, rows = room[sums:][: width * column].view(dtype).split((n * width, width * d))
    return total, tail.add_to_rows(total, dz.view(n, width), rows.view(width, d))


def tail_by_runs(
    problem: Problem,
    e: Tensor,
    terms: RowTerms,
    segments: TokensByTarget,
    entries: Entries,
    tail: Tail,
    pool: Tensor,  # uint8
    d_c: Tensor | None,
    d_bias: Tensor | None,
    shift: Tensor | None,
    dense_way: Answer,  # whether nothing of this counts
) -> None:
    """dC and dbias of a filter with a tail: the tail's part goes by runs of columns."""
    v, d, dtype = problem.v, problem.d, problem.operand_dtype
    column = 4 * d + dtype.itemsize * tail.part.n
    if pool.numel() < NARROWEST * column:
        pool = torch.empty(NARROWEST * column, dtype=torch.uint8, device=e.device)
    start = 0
    while start < v and not dense_way.known():
        width, room = room_for(start, column, pool, d_c, -(-v // 256) * 256)
        stop = min(start + width, v)
        sums = None if d_c is None else room.view(torch.float32)[: width * d].view(width, d)[: stop - start]
        x = room[4 * d * width :].view(dtype).view(tail.part.n, width)[:, : stop - start]
        bias = None if problem.bias is None else problem.bias[start:stop]
        bias_sums = tail.columns(start, problem.c[start:stop], bias, x, sums, d_bias is not None)
        finish_blocks(problem, e, terms, segments, entries, d_c, d_bias, shift, (start, stop), sums)
        if d_bias is not None and bias_sums is not None:
            d_bias[start:stop] += bias_sums
        start = stop


def dense(
    problem: Problem, plan: Plan, e: Tensor, terms: RowTerms, need: tuple[bool, bool, bool], seed: Tensor
) -> Gradients:
    """By runs of columns, dZ of each side under its filter and a library product: for any filters at all."""
    need_e, need_c, need_bias = need
    n, v, d, device = problem.n, problem.v, problem.d, problem.e.device
    pair = problem.operand_dtype is not torch.float32
    variant = plan.variant
    shared = variant.filter_e == variant.filter_c and variant.filter_e.kind is not FilterKind.SUBSET
    filter_e = side_filter(problem, plan, e, variant.filter_e, seed, True) if need_e else None
    filter_c = filter_e if shared and need_e else None
    if filter_c is None and (need_c or need_bias):
        filter_c = side_filter(problem, plan, e, variant.filter_c, seed, False)
    segments = TokensByTarget.of(problem.targets, v)
    weighted_e = weighted_sum(e, terms.sigma) if terms.smooth_apart and need_c else None
    weighted_c = weighted_sum(problem.c, problem.column_weight) if terms.smooth_apart and need_e else None

    megabytes = DEFAULT_WORKSPACE_MB if plan.workspace_mb is None else plan.workspace_mb
    column = n * problem.operand_dtype.itemsize * (2 if pair else 1) + (4 * d if need_c else 0)
    width = min(max(NARROWEST, megabytes * 2**20 // column // 256 * 256), -(-v // 8) * 8)
    dz = torch.empty((2 if pair else 1, n, width), dtype=problem.operand_dtype, device=device)
    total_e = label_rows(problem, terms, weighted_c) if need_e else None
    d_c = torch.empty((v, d), dtype=problem.c.dtype, device=device) if need_c else None
    sum_c = torch.empty((width, d), dtype=torch.float32, device=device) if need_c else None
    d_bias = torch.empty(v, dtype=torch.float32, device=device) if need_bias else None

    for start in range(0, v, width):
        index = slice(start, min(start + width, v))
        c, bias, weight = (None if x is None else x[index] for x in (problem.c, problem.bias, problem.column_weight))
        size = index.stop - start
        high, low = dz[0, :, :size], dz[1, :, :size] if pair else None
        operands = (high,) if low is None else (high, low)
        for filt in (filter_e, None if filter_c is filter_e else filter_c):
            if filt is None:
                continue
            columns, rows = filt is filter_c, filt is filter_e
            part = part_of(filt, index) if filt.kind == COLUMNS else filt
            sums = write_filtered(problem, e, c, bias, start, terms, part, high, low, columns and need_bias)
            if d_bias is not None and sums is not None:
                d_bias[index] = sums.sum(0)
            if d_c is not None and sum_c is not None and columns:
                for i, x in enumerate(operands):
                    accumulate_product(sum_c[:size], x.T, e, i == 0)
                finish_columns(d_c, sum_c[:size], start, e, terms, segments, weighted_e, weight, None)
            if total_e is not None and rows:
                for x in operands:
                    accumulate_product(total_e, x, c, False)
    d_e = None
    if total_e is not None:
        d_e = torch.empty_like(total_e) if plan.partial_e else e  # read for the last time
        scale_into(d_e, total_e, terms.scale)
    return d_e, d_c, finish_bias(problem, terms, d_bias)


def part_of(filt: ElementFilter, index: slice) -> ElementFilter:
    """The filter of a run of columns."""
    return dataclasses.replace(filt, factor=None if filt.factor is None else filt.factor[index])
