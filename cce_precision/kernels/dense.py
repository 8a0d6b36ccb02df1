"""The backward pass: dZ of one run of columns at a time, then the two products.

For each run of columns a kernel recomputes the logits and writes dZ in the operand's dtype (a hi + lo pair for SPLIT).
An unfiltered side takes library products: dC[run] = dZ^T E, complete over the tokens and hence rounded once, and dE +=
dZ C[run] in fp32, which is at least as exact as the sum that the record names; on Hopper both are one launch of
hopper_product.py. A tile-filtered side takes the products of tile_filter.py over the surviving tiles alone. Every sum
has one order: bitwise repeatable. The width of a run follows from the workspace that the caller allows; for one that
does not hold the fp32 sums of dE see by_tokens.py.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from ..numerics import Accumulation, Operand, Variant
from ..problem import Heads, Plan, Problem, Upstream
from .dz import Run, TileFilter, low_of, write_dz
from .exact import NARROWEST, products_by_hopper, walk
from .labels import sums_size
from .record import candidates
from .row_terms import row_terms
from .schedule import WIDEST
from .terms import (
    RowTerms,
    TokensByTarget,
    clean_rows,
    finish_bias,
    finish_columns,
    label_rows,
    matvec,
    weighted_sum,
)
from .tile_filter import tile_product

__all__ = ["accumulate_product", "backward_by_runs", "slices", "visiting_order"]

DEFAULT_WORKSPACE_MB = 256
NARROWEST_LIBRARY = 1024


def accumulate_product(total: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """total (fp32) = a b, or += a b, with fp32 accumulation. On the CPU (interpreted kernels) by way of fp32 copies."""
    if a.device.type == "cuda" and a.dtype is not torch.float32:
        if first:
            torch.ops.aten.mm.dtype_out(a, b, torch.float32, out=total)
        else:
            torch.ops.aten.addmm.dtype_out(total, a, b, torch.float32, out=total)
        return
    a, b = a.to(torch.float32), b.to(torch.float32)
    if first:
        torch.mm(a, b, out=total)
    else:
        total.addmm_(a, b)


def accumulate_parts(total: Tensor, parts: list[Tensor], b: Tensor, first: bool) -> None:
    """`accumulate_product` of the sum of the parts."""
    for i, a in enumerate(parts):
        accumulate_product(total, a, b, first and i == 0)


def is_split(problem: Problem, plan: Plan) -> bool:
    return plan.variant.operand is Operand.SPLIT and problem.operand_dtype is not torch.float32


def finished_by_hopper(problem: Problem, plan: Plan) -> bool:
    """Whether both products are those of hopper_product.py, which needs no fp32 sums of dC and knows no filter and no
    smoothing apart.
    """
    if plan.variant.filtered or (plan.want_smooth and problem.softcap is None):
        return False
    return products_by_hopper(problem.c)


@dataclass(frozen=True)
class Room:
    """What the workspace that a caller allows holds, in bytes."""

    total: int
    fixed: int  # a copy of e, and the sums of dE and of the labels
    column: int  # of a run
    narrowest: int  # columns of a run

    @staticmethod
    def of(problem: Problem, plan: Plan, need: tuple[bool, bool, bool]) -> Room:
        need_e, need_c, _ = need
        variant, d = plan.variant, problem.d
        megabytes = DEFAULT_WORKSPACE_MB if plan.workspace_mb is None else plan.workspace_mb
        size = problem.operand_dtype.itemsize
        sums = {Accumulation.FP32: 4, Accumulation.KAHAN: size, Accumulation.INPUT: 0}[embedding_sums(variant)]
        fixed = problem.n * d * (size + (sums if need_e else 0))
        by_hopper = finished_by_hopper(problem, plan)
        if by_hopper and need_c:
            fixed += sums_size(problem.n, d)
        column = problem.n * size * (2 if is_split(problem, plan) else 1)
        column += d * 4 if need_c and not variant.filter_c and not by_hopper else 0
        column += d * size if variant.sort_vocabulary else 0
        narrowest = min(NARROWEST if by_hopper else NARROWEST_LIBRARY, -(-problem.v // 256) * 256)
        return Room(megabytes * 2**20, fixed, column, narrowest)

    @property
    def fits(self) -> bool:
        return self.fixed + self.column * self.narrowest <= self.total


def run_width(problem: Problem, plan: Plan, need: tuple[bool, bool, bool]) -> int:
    """Columns a run, a multiple of 256 or all: as many as the workspace holds beside the sums of dE and a copy of e."""
    room = Room.of(problem, plan, need)
    width = max(room.narrowest, (room.total - room.fixed) // room.column // 256 * 256)
    if finished_by_hopper(problem, plan):  # of the workspace alone: `walk` has room elsewhere too
        return min(width, -(-problem.v // 256) * 256, WIDEST)
    runs = -(-problem.v // width)
    return min(-(-problem.v // (runs * 256)) * 256, -(-problem.v // 8) * 8)


def visiting_order(problem: Problem, plan: Plan, e: Tensor) -> Tensor | None:
    """Columns by falling mean logit before the softcap, c . mean(e) + bias (V,); None where the filter does not ask for
    it.
    """
    if not (plan.variant.sort_vocabulary and plan.variant.filtered):
        return None
    known = (problem.targets >= 0).to(torch.float32)
    key = matvec(problem.c, weighted_sum(e, known) / known.sum().clamp(min=1))
    if problem.bias is not None:
        key += problem.bias
    return torch.sort(key, descending=True, stable=True).indices


def tile_filter_of(problem: Problem, plan: Plan) -> TileFilter | None:
    variant = plan.variant
    filters = [f for f in (variant.filter_e, variant.filter_c) if f]
    if not filters:
        return None
    eps = filters[0].threshold(problem.operand_dtype)
    return TileFilter(eps, variant.tile, skip=len(filters) == 2, columns=bool(variant.filter_c))


def embedding_sums(variant: Variant) -> Accumulation:
    """How dE is summed over the runs: as the record names it where tiles are filtered, else more exactly."""
    return variant.accum_e if variant.filter_e else Accumulation.FP32


@dataclass
class EmbeddingSums:
    """dE (N, D) under summation over the runs: fp32 and unscaled, or the gradient itself where a low-precision sum is
    asked for.
    """

    total: Tensor
    lost: Tensor | None
    accum: Accumulation

    @staticmethod
    def start(problem: Problem, plan: Plan, terms: RowTerms, shift: Tensor | None) -> EmbeddingSums:
        accum = embedding_sums(plan.variant)
        if accum is Accumulation.FP32:
            return EmbeddingSums(label_rows(problem, terms, shift), None, accum)
        total = torch.zeros((problem.n, problem.d), dtype=problem.e.dtype, device=problem.e.device)
        return EmbeddingSums(total, torch.zeros_like(total) if accum is Accumulation.KAHAN else None, accum)

    def result(self, terms: RowTerms, place: Tensor | None) -> Tensor:
        """dE in the dtype and the memory of `place`; None: in fp32."""
        if self.accum is not Accumulation.FP32:
            return self.total.float() if place is None else self.total
        return torch.mul(self.total, terms.scale, out=torch.empty_like(self.total) if place is None else place)


def slices(count: int, width: int) -> list[slice]:
    """Those of `width` places, the last one with what is left."""
    return [slice(start, min(start + width, count)) for start in range(0, count, width)]


def of_columns(problem: Problem, index: slice | Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Bias and column weights there."""
    bias, weight = problem.bias, problem.column_weight
    return None if bias is None else bias[index], None if weight is None else weight[index]


def no_tokens(
    problem: Problem, plan: Plan, need: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of an empty sum."""
    inputs = (problem.e, problem.c, problem.bias)
    d_e, d_c, d_bias = (torch.zeros_like(x) if wanted and x is not None else None for x, wanted in zip(inputs, need))
    return d_e.float() if d_e is not None and plan.partial_e else d_e, d_c, d_bias


def backward_by_runs(
    problem: Problem,
    plan: Plan,
    heads: Heads,
    upstream: Upstream,
    need: tuple[bool, bool, bool],
    record: Tensor | None,  # of the forward pass, see record.py; None or empty: every tile is computed
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(dE, dC, dbias) in the dtypes of e, c and bias; None where not needed."""
    if problem.n == 0:
        return no_tokens(problem, plan, need)
    if not plan.variant.filtered:
        return walk_runs(problem, plan, heads, upstream, need, None)
    # The tokens that count come first, so that ignored ones share no tile with them.
    first = torch.sort((problem.targets < 0).to(torch.uint8), stable=True).indices
    select = lambda x: x[first] if x is not None and x.numel() else x  # noqa: E731
    packed = dataclasses.replace(problem, e=problem.e[first], targets=problem.targets[first])
    known = None if record is None or not record.numel() else (record, first)
    d_e, d_c, d_bias = walk_runs(
        packed, plan, Heads(*map(select, heads)), Upstream(*map(select, upstream)), need, known
    )
    if d_e is not None:
        d_e = torch.empty_like(d_e).index_copy_(0, first, d_e)
    return d_e, d_c, d_bias


def walk_runs(
    problem: Problem,
    plan: Plan,
    heads: Heads,
    upstream: Upstream,
    need: tuple[bool, bool, bool],
    record: tuple[Tensor, Tensor] | None,  # the forward pass's, and the token that each row stood for there
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """`backward_by_runs` for at least one token, in the order in which they stand."""
    need_e, need_c, need_bias = need
    n, v, d, device = problem.n, problem.v, problem.d, problem.e.device
    variant = plan.variant
    e = clean_rows(problem)
    order = visiting_order(problem, plan, e)
    targets = problem.positions(order)
    terms = row_terms(problem, plan, heads, upstream, targets)
    tile_filter = tile_filter_of(problem, plan)
    segments = None if terms.label_inside else TokensByTarget.of(targets, v)
    weighted_e = weighted_sum(e, terms.sigma) if terms.smooth_apart and need_c else None
    weighted_c = weighted_sum(problem.c, problem.column_weight) if terms.smooth_apart and need_e else None

    parts = 2 if is_split(problem, plan) else 1
    width = run_width(problem, plan, need)
    sums_e = EmbeddingSums.start(problem, plan, terms, weighted_c) if need_e else None
    d_c = torch.empty((v, d), dtype=problem.c.dtype, device=device) if need_c else None
    d_bias = torch.empty(v, dtype=torch.float32, device=device) if need_bias else None
    if all(x is None for x in (sums_e, d_c, d_bias)):  # nothing to walk for
        return finished(problem, plan, e, terms, sums_e, d_c, d_bias)
    if finished_by_hopper(problem, plan):
        size = parts * n * width * e.element_size() + (sums_size(n, d) if need_c else 0)
        pool = torch.empty(size, dtype=torch.uint8, device=device)
        walk(problem, e, terms, segments, pool, parts, None if sums_e is None else sums_e.total, d_c, d_bias, None)
        del pool
        return finished(problem, plan, e, terms, sums_e, d_c, d_bias)

    dz = torch.empty((parts, n, width), dtype=problem.operand_dtype, device=device)
    library_c = need_c and not variant.filter_c
    sum_c = torch.empty((width, d), dtype=torch.float32, device=device) if library_c else None
    total: Tensor | None = None
    chosen: list[Tensor | None] = [None] * -(-v // width)
    if record is not None:
        bits, tokens = record
        chosen[:] = candidates(bits, problem, order, width, tokens, heads.lse, targets, variant.tile)
    for start in range(0, v, width):
        stop = min(start + width, v)
        index = slice(start, stop) if order is None else order[start:stop]
        rows = None if order is None else order[start:stop]
        run = Run(start, problem.c[index], *of_columns(problem, index))
        operands = [buffer[:, : stop - start] for buffer in dz]
        which = chosen[start // width]
        sums, alive = write_dz(problem, e, run, terms, operands[0], low_of(operands), need_bias, tile_filter, which)
        if d_bias is not None and sums is not None:
            d_bias[index] = sums
        if d_c is not None and sum_c is not None:
            total = sum_c[: stop - start]
            accumulate_parts(total, [x.T for x in operands], e, True)
            finish_columns(d_c, total, start, e, terms, segments, weighted_e, run.weight, rows)
        elif d_c is not None and alive is not None and tile_filter is not None:
            tile_product(
                operands[0],
                e,
                alive,
                tile_filter,
                d_c,
                None,
                terms.scale,
                variant.accum_c,
                True,
                order=rows if rows is not None else torch.arange(start, stop, device=device),
                factor=run.weight,
                shift=weighted_e,
            )
        if sums_e is not None and variant.filter_e and alive is not None and tile_filter is not None:
            shift = weighted_c if stop == v and sums_e.accum is not Accumulation.FP32 else None
            tile_product(
                operands[0],
                run.c,
                alive,
                tile_filter,
                sums_e.total,
                sums_e.lost,
                terms.scale,
                sums_e.accum,
                False,
                factor=terms.sigma,
                shift=shift,
            )
        elif sums_e is not None:
            accumulate_parts(sums_e.total, operands, run.c, False)

    return finished(problem, plan, e, terms, sums_e, d_c, d_bias)


def finished(
    problem: Problem,
    plan: Plan,
    e: Tensor,  # (N, D), no longer needed
    terms: RowTerms,
    sums_e: EmbeddingSums | None,
    d_c: Tensor | None,
    d_bias: Tensor | None,  # (V,) fp32 column sums of dZ
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of what the walk over the runs has left."""
    d_e = None if sums_e is None else sums_e.result(terms, None if plan.partial_e else e)  # e is read for the last time
    return d_e, d_c, finish_bias(problem, terms, d_bias)
