"""The tail of a subset filter as small dense products: for dE a share of the columns, for dC a share of the tokens.

What lies below eps counts `share` times where its column (dE) or token (dC) was drawn, rounded to the inputs' dtype,
and not at all elsewhere. So only those columns' and those tokens' logits are computed again.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from ..numerics import Filter
from ..problem import Plan, Problem
from ..promise import distances
from .dense import accumulate_product, visiting_order
from .elements import COLUMNS, ROWS, ElementFilter, members_drawn, write_filtered
from .terms import RowTerms, matvec

__all__ = ["Tail", "members", "tail_of"]


def members(problem: Problem, plan: Plan, e: Tensor, filt: Filter, seed: Tensor, over_columns: bool) -> Tensor:
    """The columns (for dE) or tokens (for dC) that a subset filter draws, int64; -1 in a group that is not whole."""
    size, first = (problem.v, problem.first_column) if over_columns else (problem.n, 0)
    places = members_drawn(seed, size, filt.share, first, over_columns)
    order = visiting_order(problem, plan, e) if over_columns else None
    return places if order is None else torch.where(places >= 0, order[places.clamp(min=0)], -1)


@dataclass(frozen=True)
class Tail:
    """What is below eps, of drawn columns and of drawn tokens."""

    problem: Problem
    terms: RowTerms
    e: Tensor  # (N, D) contiguous
    columns_drawn: Tensor  # (V / share,) int64, -1 for none
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
        problem, drawn = self.problem, self.columns_drawn
        excess = None if self.centre is None else torch.zeros_like(total[:, 0])
        where = torch.full((problem.v + 1,), -1, dtype=torch.int64, device=drawn.device)  # the last: a spare entry
        where.scatter_(0, torch.where(drawn >= 0, drawn, problem.v), torch.arange(drawn.numel(), device=drawn.device))
        here = (problem.targets >= 0) & (problem.targets < problem.v)
        targets = torch.where(here, where[problem.targets.clamp(0, problem.v - 1)], -1)
        terms = dataclasses.replace(self.terms, targets=targets)
        factor = torch.where(drawn >= 0, self.by_columns.factor, 0)
        width = dz.shape[1]
        for start in range(0, drawn.numel(), width):
            index = drawn[start : start + width].clamp(min=0)
            c = torch.index_select(problem.c, 0, index, out=rows[: index.numel()])
            bias = None if problem.bias is None else problem.bias[index]
            filt = dataclasses.replace(self.by_columns, factor=factor[start : start + width])
            x = dz[:, : index.numel()]
            write_filtered(problem, self.e, c, bias, start, terms, filt, x, None, active=self.active)
            accumulate_product(total, x, c, False)
            if excess is not None:
                excess += x.sum(1, dtype=torch.float32)
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
    eps = filt.threshold(problem.operand_dtype)
    tokens = members(problem, plan, e, filt, seed, False)
    index, real = tokens.clamp(min=0), tokens >= 0
    drawn = members(problem, plan, e, filt, seed, True)
    share = torch.full((), float(filt.share), device=e.device)
    rows = terms.terms[:, index]
    rows[0] = torch.where(real, rows[0], torch.inf)  # hence P = 0
    targets = torch.where(real, problem.targets[index], -1)
    part_e = torch.where((targets >= 0)[:, None], e[index], 0)
    return Tail(
        problem,
        terms,
        e,
        drawn,
        dataclasses.replace(problem, e=part_e, targets=targets),
        dataclasses.replace(terms, targets=targets, terms=rows, label=torch.zeros_like(rows[0])),
        part_e,
        ElementFilter(COLUMNS, eps, seed, share.expand(drawn.shape).contiguous(), tail=True),
        ElementFilter(ROWS, eps, seed, share.expand(tokens.shape).contiguous(), tail=True),
        1 - dense,
        None if plan.tolerance is None else torch.zeros(2, dtype=torch.float32, device=e.device),
        centre,
    )
