"""The tail of a subset filter as small dense products: for dE a share of the columns, for dC a share of the tokens.

What lies below eps counts `share` times where its column (dE) or token (dC) was drawn, rounded to the inputs' dtype,
and not at all elsewhere. So only those columns' and those tokens' logits are computed again.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..numerics import Filter
from ..problem import Plan, Problem
from ..promise import distances
from .dense import accumulate_product, visiting_order
from .elements import COLUMNS, ROWS, ElementFilter, groups_of, member_of, members_drawn, write_filtered
from .entry import entry
from .launch import cdiv, next_power_of_2
from .primitives import wide
from .terms import RowTerms, matvec

__all__ = ["Tail", "members", "tail_of"]


def members(problem: Problem, plan: Plan, e: Tensor, filt: Filter, seed: Tensor, over_columns: bool) -> Tensor:
    """The columns (for dE) or tokens (for dC) that a subset filter draws, int64; -1 in a group that is not whole."""
    size, first = (problem.v, problem.first_column) if over_columns else (problem.n, 0)
    places = members_drawn(seed, size, filt.share, first, over_columns)
    order = visiting_order(problem, plan, e) if over_columns else None
    return places if order is None else torch.where(places >= 0, order[places.clamp(min=0)], -1)


@entry
@triton.jit
def drawn_columns_kernel(
    seed,  # () int64
    order,  # (V,) int64 columns in visiting order, or unused
    columns,  # (groups,) int64, out: the column that each group draws, 0 where it draws none
    factor,  # (groups,) fp32, out: the share, 0 where it draws none
    places,  # (V,) int32 of -1: where a drawn column stands among them, in and out
    groups,
    share,
    v,
    first,
    BLOCK: tl.constexpr,
    ORDER: tl.constexpr,
):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    column = member_of(seed, index, share, first, v, True)
    drawn = (column >= 0) & (index < groups)
    column = tl.where(drawn, column, 0)
    if ORDER:
        column = tl.load(order + column, mask=drawn, other=0)
    tl.store(columns + index, column, mask=index < groups)
    tl.store(factor + index, tl.where(drawn, wide(share), 0).to(tl.float32), mask=index < groups)
    tl.store(places + column, index, mask=drawn)


@entry
@triton.jit
def drawn_tokens_kernel(
    seed,  # () int64
    e,  # (N, D) contiguous
    targets,  # (N,) int64
    terms,  # (6, N) fp32 of RowTerms
    places,  # (V,) int32: where a column stands among the drawn ones, or -1
    part_e,  # (groups, D), out: the row that each group of tokens draws, 0 where it draws none or an ignored one
    part_targets,  # (groups,) int64, out
    part_terms,  # (6, groups) fp32, out; without a token P is 0
    label,  # (groups,) fp32, out: 0
    factor,  # (groups,) fp32, out: the share
    among,  # (N,) int64, out: each target's place among the drawn columns, or -1
    n,
    v,
    d,
    share,
    SHARE: tl.constexpr,  # or more
    FEATURES: tl.constexpr,
):
    group, groups = tl.program_id(0), tl.num_programs(0)
    token = member_of(seed, group, share, 0, n, False)
    target = tl.load(targets + token, mask=token >= 0, other=-1)
    for k in range(0, d, FEATURES):
        j = k + tl.arange(0, FEATURES)
        row = tl.load(e + token * d + j, mask=(target >= 0) & (j < d), other=0)
        tl.store(part_e + wide(d) * group + j, row, mask=j < d)
    field = tl.arange(0, 8)
    value = tl.load(terms + field * wide(n) + token, mask=(token >= 0) & (field < 6), other=0.0)
    value = tl.where((token < 0) & (field == 0), float("inf"), value)
    tl.store(part_terms + field * groups + group, value, mask=field < 6)
    tl.store(part_targets + group, target)
    tl.store(label + group, 0.0)
    tl.store(factor + group, wide(share).to(tl.float32))
    tokens = group * share + tl.arange(0, SHARE)
    inside = (tl.arange(0, SHARE) < share) & (tokens < n)
    target = tl.load(targets + tokens, mask=inside, other=-1)
    place = tl.load(places + target, mask=inside & (target >= 0) & (target < v), other=-1)
    tl.store(among + tokens, place.to(tl.int64), mask=inside)


@dataclass(frozen=True)
class Tail:
    """What is below eps, of drawn columns and of drawn tokens."""

    problem: Problem
    terms: RowTerms  # with the targets' places among the drawn columns
    e: Tensor  # (N, D) contiguous
    columns_drawn: Tensor  # (V / share,) int64, some of which the factor of `by_columns` makes 0
    part: Problem  # the drawn tokens alone
    part_terms: RowTerms
    part_e: Tensor  # (N / share, D), 0 for none
    by_columns: ElementFilter
    by_tokens: ElementFilter
    active: Tensor  # () int32: 0 where nothing of it counts
    energies: Tensor | None  # (2,) fp32: where wanted, the sums that promise.Seen knows, of dE and of dC, in and out
    centre: Tensor | None  # (2, D) fp32, see filtered.centres

    def add_to_rows(self, total: Tensor, dz: Tensor, rows: Tensor) -> Tensor | None:
        """total (N, D) fp32 += the tail of the drawn columns times their classifier rows, by way of dz (N, W) and rows
        (W, D). Returns the row sums of the tail, (N,) fp32, of a centred variant.
        """
        problem, drawn, factor = self.problem, self.columns_drawn, self.by_columns.factor
        assert factor is not None
        excess = None if self.centre is None else torch.zeros_like(total[:, 0])
        width = dz.shape[1]
        for start in range(0, drawn.numel(), width):
            index = drawn[start : start + width]
            c = torch.index_select(problem.c, 0, index, out=rows[: index.numel()])
            bias = None if problem.bias is None else problem.bias[index]
            filt = dataclasses.replace(self.by_columns, factor=factor[start : start + width])
            x = dz[:, : index.numel()]
            write_filtered(
                problem, self.e, c, bias, start, self.terms, filt, x, None, active=self.active, row_sums=excess
            )
            accumulate_product(total, x, c, False)
            if self.energies is not None:
                self.energies[0] += self._energy(x, c)
        return excess

    def _energy(self, x: Tensor, c: Tensor) -> Tensor:
        """0-dim fp32: the sum of x_ij^2 ||c_j||^2, of a centred variant with c_j less the centre of the token."""
        if self.centre is None:
            return energy(x, c)
        norms = torch.linalg.vector_norm(c, dim=1, dtype=torch.float32)
        parts = zip((x[::2], x[1::2]), self.centre)
        return torch.stack([_squares(some) @ distances(norms, matvec(c, m), m).square() for some, m in parts]).sum()

    def columns(
        self, start: int, c: Tensor, bias: Tensor | None, x: Tensor, total: Tensor | None, sums: bool
    ) -> Tensor | None:
        """total (W, D) fp32 = the tail of the drawn tokens in the columns c (W, D) from `start` on, times their
        embeddings, by way of x (drawn tokens, W). Returns its column sums (W,), if wanted.
        """
        column_sums = write_filtered(
            self.part, self.part_e, c, bias, start, self.part_terms, self.by_tokens, x, None, sums, self.active
        )
        if total is not None:
            accumulate_product(total, x.T, self.part_e, True)
        if self.energies is not None:
            self.energies[1] += energy(x.T, self.part_e)
        return None if column_sums is None else column_sums.sum(0)


def energy(x: Tensor, rows: Tensor) -> Tensor:
    """0-dim fp32: the sum of x_ij^2 ||rows_j||^2."""
    return _squares(x) @ torch.linalg.vector_norm(rows, dim=1, dtype=torch.float32).square()


def _squares(x: Tensor) -> Tensor:
    """(W,) fp32 sums of x_ij^2 over the rows of x (N, W)."""
    return torch.linalg.vector_norm(x, dim=0, dtype=torch.float32).square()


def tail_of(
    problem: Problem,
    plan: Plan,
    e: Tensor,
    terms: RowTerms,
    filt: Filter,
    seed: Tensor,
    dense: Tensor,
    centre: Tensor | None,
) -> Tail:
    """The tail of a subset filter, the same on both sides; left undone where `dense` (0-dim int32) is 1."""
    (n, d), v, first, share = e.shape, problem.v, problem.first_column, filt.share
    size = groups_of(v, share, first), groups_of(n, share, 0)
    new = lambda *shape, dtype=torch.float32: torch.empty(shape, dtype=dtype, device=e.device)  # noqa: E731
    order = visiting_order(problem, plan, e)
    columns, factor_e, factor_c = new(size[0], dtype=torch.int64), new(size[0]), new(size[1])
    places = torch.full((v,), -1, dtype=torch.int32, device=e.device)
    drawn_columns_kernel[(cdiv(size[0], 256),)](
        seed, columns if order is None else order, columns, factor_e, places, size[0], share, v, first,
        BLOCK=256, ORDER=order is not None,
    )  # fmt: skip
    part_e, rows, label = new(size[1], d, dtype=e.dtype), new(6, size[1]), new(size[1])
    targets, among = new(size[1], dtype=torch.int64), new(n, dtype=torch.int64)
    drawn_tokens_kernel[(size[1],)](
        seed, e, problem.targets, terms.terms, places, part_e, targets, rows, label, factor_c, among, n, v, d, share,
        SHARE=next_power_of_2(share), FEATURES=min(1024, next_power_of_2(d)), num_warps=4,
    )  # fmt: skip
    eps = filt.threshold(problem.operand_dtype)
    return Tail(
        problem,
        dataclasses.replace(terms, targets=among),
        e,
        columns,
        dataclasses.replace(problem, e=part_e, targets=targets),
        dataclasses.replace(terms, targets=targets, terms=rows, label=label),
        part_e,
        ElementFilter(COLUMNS, eps, seed, factor_e, tail=True),
        ElementFilter(ROWS, eps, seed, factor_c, tail=True),
        1 - dense,
        None if plan.tolerance is None else torch.zeros(2, dtype=torch.float32, device=e.device),
        centre,
    )
