"""The backward pass of variants whose filters work on single entries.

`sparse`, where both sides have one filter: dZ is a sparse matrix (sparse.py), and below the threshold a subset filter
adds two small dense products (subsets.py). Where the hits are more than the workspace holds, as on a flat softmax, the
device itself takes the dense way instead: dZ under the same filter by runs of columns (elements.py), and products. The
host launches both and waits for neither. `dense`, for all else: library products of each side's dZ.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from ..numerics import Filter, FilterKind
from ..problem import Heads, Plan, Problem, Upstream
from .dense import accumulate_product, no_tokens
from .elements import COLUMNS, ROWS, ElementFilter, write_filtered
from .fallback import multiply_where
from .hits import BLOCK, found_again, kept_filter, words_of
from .lists import counts_of, lists_of
from .sparse import Entries, add_rows, entries_of, finish_blocks
from .subsets import Tail, members, tail_of
from .terms import RowTerms, TokensByTarget, clean_rows, finish_columns, label_rows, row_terms, weighted_sum

__all__ = ["backward_filtered", "capacity", "occupancy"]

DEFAULT_WORKSPACE_MB = 192
NARROWEST = 256

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
    return sparse(problem, plan, e, terms, need, seed, record)


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
    """The workspace of a sparse pass. What the dense way needs lies over what the sparse way needs: only one runs."""

    hits: int  # capacity
    values: Tensor  # (hits, BLOCK) fp32
    columns: Tensor  # (entries,) int32
    weights: Tensor  # (entries,) fp32
    dz: Tensor  # (1 or 2, N, W) operand dtype
    sums: Tensor | None  # (W, D) fp32, for a filter with a tail

    @staticmethod
    def of(problem: Problem, workspace_mb: int | None, tail: bool) -> Buffers:
        n, d, device, dtype = problem.n, problem.d, problem.e.device, problem.operand_dtype
        size = (DEFAULT_WORKSPACE_MB if workspace_mb is None else workspace_mb) * 2**20
        hits, entries = capacities(n, -(-problem.v // BLOCK), size)
        parts = 1 if dtype is torch.float32 else 2
        column = parts * n * dtype.itemsize
        width = min(max(NARROWEST, size // column // 256 * 256), -(-problem.v // 16) * 16)
        size = max(hits * 4 * BLOCK + entries * 8, width * column)
        pool = torch.empty(-(-size // 4), dtype=torch.float32, device=device)
        part, rest = pool[: hits * BLOCK], pool[hits * BLOCK : hits * BLOCK + 2 * entries]
        return Buffers(
            hits,
            part.view(hits, BLOCK),
            rest[:entries].view(torch.int32),
            rest[entries:],
            pool.view(dtype)[: parts * n * width].view(parts, n, width),
            torch.empty((width, d), dtype=torch.float32, device=device) if tail else None,
        )


def capacities(n: int, blocks: int, size: int) -> tuple[int, int]:
    """(hits, kept entries) that `size` bytes hold, at one and a half entries a hit; at most all that there can be."""
    hits = min(n * blocks, size // (4 * BLOCK + 8 + 12))
    return hits, hits * BLOCK if hits == n * blocks else hits * 3 // 2


def words_for(problem: Problem, filt: Filter, seed: Tensor, lse: Tensor, record: Tensor | None) -> Tensor:
    """The hits as words (column tiles, N) that are the caller's to change: from the forward pass, or found again."""
    if record is not None and record.numel() > 0:
        return words_of(problem, record).clone()
    return found_again(problem, filt, seed, lse)


def capacity(problem: Problem, workspace_mb: int | None) -> int:
    """How many hits the workspace holds. With more of them a sparse pass takes the dense way."""
    size = (DEFAULT_WORKSPACE_MB if workspace_mb is None else workspace_mb) * 2**20
    return capacities(problem.n, -(-problem.v // BLOCK), size)[0]


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
    e: Tensor,
    terms: RowTerms,
    need: tuple[bool, bool, bool],
    seed: Tensor,
    record: Tensor | None,
) -> Gradients:
    """The kept entries as a sparse matrix, the tail of a subset filter by small dense products."""
    need_e, need_c, need_bias = need
    v, d, device, filt = problem.v, problem.d, problem.e.device, plan.variant.filter_e
    buffers = Buffers.of(problem, plan.workspace_mb, filt.kind is FilterKind.SUBSET)
    lse = terms.terms[0]
    words = words_for(problem, filt, seed, lse, record)
    kept = ElementFilter.of(filt, problem.operand_dtype, seed)
    lists = lists_of(words, problem.c, lse, buffers.hits)
    del words
    entries = entries_of(problem, e, terms, kept, lists, buffers.values, buffers.columns, buffers.weights)
    segments = TokensByTarget.of(problem.targets, v)
    weighted_e = weighted_sum(e, terms.sigma) if terms.smooth_apart and need_c else None
    weighted_c = weighted_sum(problem.c, problem.column_weight) if terms.smooth_apart and need_e else None
    total_e = label_rows(problem, terms, weighted_c) if need_e else None
    d_c = torch.empty((v, d), dtype=problem.c.dtype, device=device) if need_c else None
    d_bias = torch.empty(v, dtype=torch.float32, device=device) if need_bias else None
    tail = None
    if filt.kind is FilterKind.SUBSET:
        tail = tail_of(problem, plan, e, terms, filt, seed)
        if total_e is not None:
            tail.add_to_rows(total_e)
    elif need_c or need_bias:
        finish_blocks(problem, e, terms, segments, entries, d_c, d_bias, weighted_e)
    if total_e is not None:
        add_rows(problem, entries, total_e)
    if tail is not None or buffers.hits < problem.n * -(-v // BLOCK):
        by_runs(problem, e, terms, kept, entries, segments, buffers, tail, total_e, d_c, d_bias, weighted_e)
    return finish(problem, plan, terms, total_e, d_c, d_bias)


def by_runs(
    problem: Problem,
    e: Tensor,
    terms: RowTerms,
    kept: ElementFilter,
    entries: Entries,
    segments: TokensByTarget,
    buffers: Buffers,
    tail: Tail | None,
    total_e: Tensor | None,
    d_c: Tensor | None,
    d_bias: Tensor | None,
    shift: Tensor | None,
) -> None:
    """What goes by runs of columns: the tail's part of dC, and where entries.dense is 1 everything that is kept."""
    v, width = problem.v, buffers.dz.shape[2]
    # Beside a tail the labels are added at the end.
    own = terms if tail is None else dataclasses.replace(terms, label=torch.zeros_like(terms.label))
    for start in range(0, v, width):
        stop = min(start + width, v)
        c, bias = (None if x is None else x[start:stop] for x in (problem.c, problem.bias))
        high, *rest = (part[:, : stop - start] for part in buffers.dz)
        low = rest[0] if rest else None
        sums, bias_sums = None, None
        if tail is not None:
            sums = buffers.sums[: stop - start] if d_c is not None and buffers.sums is not None else None
            bias_sums = tail.columns(start, c, bias, sums, d_bias is not None)
        active = entries.dense
        more = write_filtered(problem, e, c, bias, start, own, kept, high, low, d_bias is not None, active)
        multiply_where(problem, e, c, start, terms, segments, high, low, total_e, d_c, sums, shift, active)
        if tail is not None and (d_c is not None or d_bias is not None):
            finish_blocks(problem, e, terms, segments, entries, d_c, d_bias, shift, (start, stop), sums, always=True)
        if d_bias is not None and more is not None:
            part = d_bias[start:stop]
            if bias_sums is None:
                part.copy_(torch.where(active != 0, more.sum(0), part))
            else:
                part += more.sum(0) + bias_sums


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
    return finish(problem, plan, terms, total_e, d_c, d_bias)


def part_of(filt: ElementFilter, index: slice) -> ElementFilter:
    """The filter of a run of columns."""
    return dataclasses.replace(filt, factor=None if filt.factor is None else filt.factor[index])


def finish(
    problem: Problem, plan: Plan, terms: RowTerms, total_e: Tensor | None, d_c: Tensor | None, d_bias: Tensor | None
) -> Gradients:
    """dE and dbias rounded once from their sums; dC is finished already."""
    d_e = None
    if total_e is not None:
        d_e = total_e.mul_(terms.scale) if plan.partial_e else None
        if d_e is None:
            d_e = torch.mul(total_e, terms.scale, out=torch.empty_like(total_e, dtype=problem.e.dtype))
    if d_bias is None or problem.bias is None:
        return d_e, d_c, None
    if terms.smooth_apart:
        total_sigma = terms.sigma.sum()
        d_bias -= total_sigma if problem.column_weight is None else problem.column_weight * total_sigma
    return d_e, d_c, torch.mul(d_bias, terms.scale).to(problem.bias.dtype)
