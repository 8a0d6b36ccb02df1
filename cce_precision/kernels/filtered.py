"""The backward pass of variants whose filters work on single entries.

`sparse`, where both sides have one filter: dZ is a sparse matrix (sparse.py), and below the threshold a subset filter
adds two small dense products (subsets.py). Where the hits are more than the workspace holds, as on a flat softmax, the
device itself takes the exact dense way instead (fallback.py). The host launches both and waits for neither. `dense`,
for all other filters: library products of each side's dZ.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from ..numerics import Filter, FilterKind
from ..problem import Heads, Plan, Problem, Upstream
from ..promise import filter_error
from .dense import accumulate_product, no_tokens
from .elements import COLUMNS, ROWS, ElementFilter, write_filtered
from .fallback import NARROWEST, exact_where
from .hits import BLOCK, found_again, kept_filter, words_of
from .lists import counts_of, lists_of
from .sparse import Entries, entries_of, finish_blocks, finish_rows, seen_of
from .subsets import Tail, members, tail_of
from .terms import (
    RowTerms,
    TokensByTarget,
    clean_rows,
    finish_columns,
    label_rows,
    row_terms,
    scale_into,
    weighted_sum,
)

__all__ = ["backward_filtered", "capacity", "occupancy"]

DEFAULT_WORKSPACE_MB = 192
TAIL_SHARE = 2  # the part of the workspace that holds a subset filter's sums of dC

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
    e = clean_rows(problem)
    terms = row_terms(problem, plan, heads, upstream, problem.targets)
    if kept_filter(problem, plan) is None:
        return dense(problem, plan, e, terms, need, seed)
    return sparse(problem, plan, heads, e, terms, need, seed, record)


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
class Buffers:
    """The workspace of a sparse pass. What the exact way needs lies over what the sparse way needs: only one runs."""

    hits: int  # capacity
    values: Tensor  # (hits, BLOCK) fp32
    columns: Tensor  # (entries,) int32
    weights: Tensor  # (entries,) fp32
    pool: Tensor  # fp32, all of it

    @staticmethod
    def of(problem: Problem, size: int) -> Buffers:
        """In `size` bytes, or as many as the exact way needs at least."""
        n, d, dtype = problem.n, problem.d, problem.operand_dtype
        hits, entries = capacities(n, -(-problem.v // BLOCK), size)
        least = -(-n * d // 64) * 256 + n * NARROWEST * dtype.itemsize
        size = max(hits * 4 * BLOCK + entries * 8, least)
        pool = torch.empty(-(-size // 4), dtype=torch.float32, device=problem.e.device)
        values, rest = pool[: hits * BLOCK], pool[hits * BLOCK : hits * BLOCK + 2 * entries]
        return Buffers(hits, values.view(hits, BLOCK), rest[:entries].view(torch.int32), rest[entries:], pool)


def capacities(n: int, blocks: int, size: int) -> tuple[int, int]:
    """(hits, kept entries) that `size` bytes hold, at one and a half entries a hit; at most all that there can be."""
    hits = min(n * blocks, size // (4 * BLOCK + 8 + 12))
    return hits, hits * BLOCK if hits == n * blocks else hits * 3 // 2


def sizes(problem: Problem, plan: Plan) -> tuple[int, int]:
    """Bytes of the workspace for a sparse pass: the buffers', and those of the tail's sums of dC."""
    size = (DEFAULT_WORKSPACE_MB if plan.workspace_mb is None else plan.workspace_mb) * 2**20
    tail = size // TAIL_SHARE if plan.variant.filter_e.kind is FilterKind.SUBSET else 0
    return size - tail, tail


def words_for(problem: Problem, filt: Filter, seed: Tensor, lse: Tensor, record: Tensor | None) -> Tensor:
    """The hits as words (column tiles, N): from the forward pass, or found again."""
    if record is not None and record.numel() > 0:
        return words_of(problem, record)
    return found_again(problem, filt, seed, lse)


def capacity(problem: Problem, plan: Plan) -> int:
    """How many hits the workspace holds. With more of them a sparse pass takes the exact dense way."""
    return capacities(problem.n, -(-problem.v // BLOCK), sizes(problem, plan)[0])[0]


def occupancy(problem: Problem, plan: Plan, lse: Tensor, seed: Tensor, record: Tensor | None) -> Tensor:
    """How many hits there are, 0-dim int64. Requires `kept_filter`; lse (N,) as in the heads."""
    filt = kept_filter(problem, plan)
    assert filt is not None
    lse = torch.where(problem.targets >= 0, lse, torch.inf)
    by_block, _ = counts_of(words_for(problem, filt, seed, lse, record), problem.c, lse)
    return by_block.sum(dtype=torch.int64)


def sparse(
    problem: Problem,
    plan: Plan,
    heads: Heads,
    e: Tensor,
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
    size, tail_size = sizes(problem, plan)
    buffers = Buffers.of(problem, size)
    lse = terms.terms[0]
    words = words_for(problem, filt, seed, lse, record)
    kept = ElementFilter.of(filt, problem.operand_dtype, seed)
    lists = lists_of(words, problem.c, lse, buffers.hits)
    del words
    entries = entries_of(problem, e, terms, kept, lists, buffers.values, buffers.columns, buffers.weights)
    segments = TokensByTarget.of(problem.targets, v)
    shift_c = weighted_sum(e, terms.sigma) if terms.smooth_apart and need_c else None
    shift_e = weighted_sum(problem.c, problem.column_weight) if terms.smooth_apart and need_e else None
    d_c = torch.empty((v, d), dtype=problem.c.dtype, device=device) if need_c else None
    d_bias = torch.empty(v, dtype=torch.float32, device=device) if need_bias else None
    base, energies = None, None
    if filt.kind is FilterKind.SUBSET:
        tail = tail_of(problem, plan, e, terms, filt, seed, entries.dense)
        if need_e:
            base = label_rows(problem, terms, shift_e)
            tail.add_to_rows(base)
        if need_c or need_bias:
            tail_by_runs(problem, e, terms, segments, entries, tail, tail_size, d_c, d_bias, shift_c)
        energies = tail.energies
        del tail
    elif need_c or need_bias:
        finish_blocks(problem, e, terms, segments, entries, d_c, d_bias, shift_c)
    d_e = None
    if need_e:  # in the place of the copy of e, where that is read for the last time
        apart = plan.partial_e or plan.tolerance is not None
        d_e = torch.empty((n, d), dtype=torch.float32 if plan.partial_e else e.dtype, device=device) if apart else e
    if plan.tolerance is not None and (need_e or need_c):
        if d_e is not None:
            finish_rows(problem, terms, entries, d_e, base, shift_e)
        seen = seen_of(problem, terms, entries, kept, heads.nll)
        if energies is not None:
            seen = dataclasses.replace(seen, energy_e=energies[0], energy_c=energies[1])
        broken = ~(filter_error(problem, filt, seen, terms.scale, (d_e, d_c)) <= plan.tolerance)
        entries = dataclasses.replace(entries, dense=torch.maximum(entries.dense, broken.to(torch.int32)))
    total_e = None
    if plan.tolerance is not None or buffers.hits < n * -(-v // BLOCK):
        active = entries.dense
        total_e = exact_where(problem, e, terms, segments, buffers.pool, need_e, d_c, d_bias, shift_e, shift_c, active)
    if d_e is not None:
        if plan.tolerance is None:
            finish_rows(problem, terms, entries, d_e, base, shift_e)
        if total_e is not None:
            scale_into(d_e, total_e, terms.scale, entries.dense)
    return d_e, d_c, finish_bias(problem, terms, d_bias)


def tail_by_runs(
    problem: Problem,
    e: Tensor,
    terms: RowTerms,
    segments: TokensByTarget,
    entries: Entries,
    tail: Tail,
    size: int,  # bytes for the tail's dZ and sums
    d_c: Tensor | None,
    d_bias: Tensor | None,
    shift: Tensor | None,
) -> None:
    """dC and dbias of a filter with a tail, where entries.dense is not 1: the tail's part goes by runs of columns."""
    v, d = problem.v, problem.d
    column = 4 * d + problem.operand_dtype.itemsize * tail.part.n
    width = min(max(NARROWEST, size // column // 256 * 256), -(-v // BLOCK) * BLOCK)
    buffer = torch.empty((width, d), dtype=torch.float32, device=e.device) if d_c is not None else None
    for start in range(0, v, width):
        stop = min(start + width, v)
        sums = None if buffer is None else buffer[: stop - start]
        bias = None if problem.bias is None else problem.bias[start:stop]
        bias_sums = tail.columns(start, problem.c[start:stop], bias, sums, d_bias is not None)
        finish_blocks(problem, e, terms, segments, entries, d_c, d_bias, shift, (start, stop), sums)
        if d_bias is not None and bias_sums is not None:
            d_bias[start:stop] += bias_sums


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


def finish_bias(problem: Problem, terms: RowTerms, sums: Tensor | None) -> Tensor | None:
    """dbias, rounded once from the column sums (V,) of dZ, which it changes."""
    if sums is None or problem.bias is None:
        return None
    if terms.smooth_apart:
        total = terms.sigma.sum()
        sums -= total if problem.column_weight is None else problem.column_weight * total
    return torch.mul(sums, terms.scale).to(problem.bias.dtype)
