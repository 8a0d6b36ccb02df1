"""Blocks of the logits: how rows and columns are cut, and the logits of one block. Nothing larger is ever formed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..numerics import Variant
from ..problem import Plan, Problem

# Live buffers of one block (logits, probabilities, slope) that share the budget of one tile row, 128 x V elements.
_BUFFERS = 3
_MOST_ROWS = 1024
_MOST_COLUMNS = 1024


@dataclass(frozen=True)
class Columns:
    """A run of columns in visiting order: positions [start, stop), and where they stand in the classifier."""

    start: int
    stop: int
    index: slice | Tensor  # into c, bias and column_weight

    @property
    def width(self) -> int:
        return self.stop - self.start


def block_shape(problem: Problem, plan: Plan, by_tile: bool) -> tuple[int, int]:
    """(rows, columns) of one block: the variant's tile where tiles matter, else what fits in one tile row of logits."""
    tile_rows, tile_columns = plan.variant.tile
    if by_tile:
        return tile_rows, tile_columns
    budget = tile_rows * problem.v // _BUFFERS
    if plan.workspace_mb is not None:
        budget = min(budget, plan.workspace_mb * 2**20 // (_BUFFERS * problem.compute_dtype.itemsize))
    rows = min(_MOST_ROWS, problem.n)
    columns = min(_MOST_COLUMNS, max(tile_columns, budget // max(rows, 1) // tile_columns * tile_columns))
    return max(1, min(rows, max(tile_rows, budget // columns))), columns


def valid_rows(problem: Problem) -> Tensor:
    """Indices of the tokens that count, ascending."""
    return (problem.targets >= 0).nonzero().squeeze(1)


def row_blocks(problem: Problem, rows: Tensor, size: int) -> Iterator[slice | Tensor]:
    """Runs of `size` of the given rows as indices into e: slices, hence views of e, where no token is ignored."""
    for start in range(0, rows.numel(), size):
        stop = min(start + size, rows.numel())
        yield slice(start, stop) if rows.numel() == problem.n else rows[start:stop]


def column_blocks(problem: Problem, order: Tensor | None, size: int) -> Iterator[Columns]:
    """Runs of `size` columns in visiting order (None: by id)."""
    for start in range(0, problem.v, size):
        stop = min(start + size, problem.v)
        yield Columns(start, stop, slice(start, stop) if order is None else order[start:stop])


def vocabulary_order(problem: Problem, variant: Variant, rows: Tensor) -> Tensor | None:
    """Columns by falling mean logit before the softcap, which is c . mean(e) + bias; None where the variant keeps the
    id order.

    The order decides which entries share a tile or a stratum, never what a gradient means.
    """
    if not variant.sort_vocabulary or rows.numel() == 0:
        return None
    dtype = problem.compute_dtype
    mean = torch.zeros(problem.d, dtype=dtype, device=problem.e.device)
    for index in row_blocks(problem, rows, _MOST_ROWS):
        mean += problem.e[index].to(dtype).sum(0)
    mean /= rows.numel()
    key = torch.empty(problem.v, dtype=dtype, device=problem.e.device)
    for columns in column_blocks(problem, None, _MOST_COLUMNS):
        torch.mv(problem.c[columns.index].to(dtype), mean, out=key[columns.index])
    if problem.bias is not None:
        key += problem.bias
    return torch.argsort(key, descending=True, stable=True)


def block_logits(problem: Problem, e: Tensor, c: Tensor, columns: Columns) -> tuple[Tensor, Tensor | None]:
    """Logits z (rows, columns) of a block and, with a softcap, the slope dcap/dy = 1 - tanh^2 at each.

    e (rows, D) and c (columns, D) are in the compute dtype already; products and sums are in that dtype.
    """
    z = e @ c.T
    if problem.bias is not None:
        z += problem.bias[columns.index]
    slope = None
    if problem.softcap is not None:
        z.div_(problem.softcap).tanh_()
        slope = 1 - z * z
        z.mul_(problem.softcap)
    if problem.temperature != 1.0:
        z.div_(problem.temperature)
    return z, slope


def local_targets(targets: Tensor, columns: Columns) -> tuple[Tensor, Tensor]:
    """For target positions (rows,): which lie in this run of columns, and where (0 for the others)."""
    inside = (targets >= columns.start) & (targets < columns.stop)
    return inside, torch.where(inside, targets - columns.start, 0)
