"""The passes once more, stage by stage: each stage rounds as the variant's record says, or is exact (fp64).

    run(problem, plan, stages)  ->  nll, dE, dC of the summed nll

With all stages it gives what the eager passes and PyTorch's stored logits give, bit for bit (tests/test_budget.py);
with none, the exact gradient. A stage takes what the one before it gives, so that with the first k stages the rest
carries the errors of those k exactly to the end.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cce_precision.analysis.budget_stages import ALL_STAGES, Stage, Stages, stage_dtype
from cce_precision.eager.accumulate import Accumulator
from cce_precision.eager.backward import MOST_GATHERED, as_ids, centres, count_kept
from cce_precision.eager.filters import sampled, tile_survives
from cce_precision.eager.forward import OnlineSoftmax, _finish
from cce_precision.eager.tiles import (
    Columns,
    block_logits,
    block_shape,
    column_blocks,
    local_targets,
    row_blocks,
    valid_rows,
    vocabulary_order,
)
from cce_precision.numerics import Accumulation, Filter, FilterKind, Operand, Path, power_of_two
from cce_precision.problem import Plan, Problem, is_centred

__all__ = ["Result", "run"]


class Result(NamedTuple):
    """What a call gives; fp64 copies."""

    loss: Tensor  # (N,) nll
    dE: Tensor  # (N, D)
    dC: Tensor  # (V, D)


def run(problem: Problem, plan: Plan, stages: Stages = ALL_STAGES, g: Tensor | None = None, seed: int = 0) -> Result:
    """nll, and the gradients of sum_i g_i nll_i, with these stages as the record says and the others exact.

    Args:
        problem: without column weights; ignored tokens (target -1) take no part.
        g: (N,) upstream gradients; ones by default.

    Raises ValueError for a compiled variant, whose stages cannot be told apart.
    """
    g = torch.ones(problem.n, dtype=problem.compute_dtype) if g is None else g.to(problem.compute_dtype)
    if plan.variant.path is Path.TILED:
        return _Tiled(problem, plan, stages, g, seed).run()
    if plan.variant.path is Path.COMPILED:
        raise ValueError(f"{plan.variant.name} is one compiled function: its stages cannot be switched one by one")
    return _plain(problem, stages, g)


# -- stored logits -----------------------------------------------------------------------------------------------------


def _plain(problem: Problem, stages: Stages, g: Tensor) -> Result:
    """As `eager/plain.py` and PyTorch's autograd. A library product rounds its own output: PRODUCT holds OUTPUT."""
    stored, compute = problem.operand_dtype, problem.compute_dtype
    at = lambda stage, dtype: stage_dtype(stages, stage, dtype)  # noqa: E731
    valid = problem.targets >= 0
    e = problem.e.masked_fill(~valid[:, None], 0)

    def logits(y: Tensor) -> Tensor:
        """What PyTorch makes of a stored product, in the dtype of `y` up to the softmax."""
        if problem.softcap is not None:
            y = problem.softcap * torch.tanh(y / problem.softcap)
        y = y.to(torch.promote_types(y.dtype, compute))
        return y / problem.temperature if problem.temperature != 1.0 else y

    kind = at(Stage.LOGITS, stored)
    left, right = (x.to(kind) for x in (e, problem.c))
    y = F.linear(left, right, None if problem.bias is None else problem.bias.to(kind))
    z = logits(y).to(at(Stage.SOFTMAX, compute)).requires_grad_()
    nll = F.cross_entropy(z, problem.targets, ignore_index=-1, reduction="none")
    (d_z,) = torch.autograd.grad(nll, z, g.to(nll.dtype))
    d_y = _through_cap(logits, y, d_z, at(Stage.DZ, stored), at(Stage.DZ, compute))
    kind = at(Stage.PRODUCT, stored)
    d_e, d_c = d_y.to(kind) @ problem.c.to(kind), d_y.to(kind).T @ e.to(kind)
    if Stage.OUTPUT in stages:
        d_e, d_c = d_e.to(problem.e.dtype), d_c.to(problem.c.dtype)
    return Result(nll.detach().double(), d_e.double(), d_c.double())


def _through_cap(logits, y: Tensor, d_z: Tensor, stored: torch.dtype, compute: torch.dtype) -> Tensor:  # type: ignore[no-untyped-def]
    """The gradient of the stored product, by PyTorch's own backward of what follows it."""
    y = y.to(stored).requires_grad_()
    (d_y,) = torch.autograd.grad(logits(y), y, d_z.to(compute))
    return d_y


# -- tiles -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Block:
    """One block of the softmax."""

    index: slice | Tensor  # tokens
    columns: Columns
    p: Tensor  # (rows, columns), 0 at the targets
    slope: Tensor | None  # (rows, columns) of the softcap
    inside: Tensor  # (rows,) whether the target is among these columns
    place: Tensor  # (rows, 1) where


class _Tiled:
    """One call of a tiled variant."""

    def __init__(self, problem: Problem, plan: Plan, stages: Stages, g: Tensor, seed: int) -> None:
        self.problem, self.plan, self.variant, self.stages = problem, plan, plan.variant, stages
        self.dtypes = {stage: stage_dtype(stages, stage, problem.compute_dtype) for stage in Stage}
        self.seed = torch.full((), seed, dtype=torch.int64)
        self.rows = valid_rows(problem)
        self.order = vocabulary_order(problem, self.variant, self.rows)
        self.targets = problem.positions(self.order)
        self.late = power_of_two(g[self.rows])
        self.g = g / self.late
        self.nll, self.lse = self.heads()
        self.complement = -torch.expm1(-self.nll)

    def scale(self, stage: Stage) -> Tensor:
        """The factor of the sums, as a stage multiplies by it."""
        return self.late.to(self.dtypes[stage]) / self.problem.temperature

    def logits(self, index: slice | Tensor, columns: Columns) -> tuple[Tensor, Tensor | None]:
        problem, kind = self.problem, self.dtypes[Stage.LOGITS]
        return block_logits(problem, problem.e[index].to(kind), problem.c[columns.index].to(kind), columns)

    def heads(self) -> tuple[Tensor, Tensor]:
        """nll and lse (N,), 0 where ignored."""
        problem, kind = self.problem, self.dtypes[Stage.SOFTMAX]
        nll, lse = torch.zeros(2, problem.n, dtype=kind)
        height, width = block_shape(problem, self.plan, by_tile=False)
        for index in row_blocks(problem, self.rows, height):
            targets = problem.targets[index]
            state = OnlineSoftmax.start(len(targets), nll, False)
            z_t = torch.zeros(len(targets), dtype=kind)
            for columns in column_blocks(problem, None, width):
                z = self.logits(index, columns)[0].to(kind)
                inside, place = local_targets(targets, columns)
                here = z.gather(1, place[:, None])
                z_t = torch.where(inside, here.squeeze(1), z_t)
                state.update(z.scatter_(1, place[:, None], torch.where(inside[:, None], -torch.inf, here)))
            nll[index], lse[index], _ = _finish(state, z_t)
        return nll, lse

    def block(self, index: slice | Tensor, columns: Columns) -> _Block:
        z, slope = self.logits(index, columns)
        p = torch.exp(z.to(self.dtypes[Stage.SOFTMAX]) - self.lse[index][:, None])
        inside, place = local_targets(self.targets[index], columns)
        place = place[:, None]
        p.scatter_(1, place, torch.where(inside[:, None], 0, p.gather(1, place)))
        return _Block(index, columns, p, slope, inside, place)

    def filtered(self, block: _Block, filt: Filter, over_columns: bool) -> Tensor | None:
        """P^; None for a dropped tile."""
        if not filt or Stage.FILTER not in self.stages:
            return block.p
        p, eps = block.p.to(self.dtypes[Stage.FILTER]), filt.threshold(self.problem.operand_dtype)
        if filt.by_tile:
            return p if tile_survives(p, self.complement[block.index].to(p.dtype), block.inside, eps) else None
        columns, ids = block.columns, as_ids(block.columns.index, p)
        return sampled(p, filt, eps, self.seed, as_ids(block.index, p), columns, ids, over_columns)

    def target_term(self, index: slice | Tensor) -> Tensor:
        """The target's entry of dZ (rows,), without the slope."""
        kind = self.dtypes[Stage.DZ]
        return -(self.g[index].to(kind) * self.complement[index].to(kind))

    def target_slope(self, index: slice | Tensor) -> Tensor | float:
        if self.problem.softcap is None:
            return 1.0
        z_t = (self.lse[index] - self.nll[index]).to(self.dtypes[Stage.DZ]) * self.problem.temperature
        return 1 - (z_t / self.problem.softcap) ** 2

    def dz(self, block: _Block, filt: Filter, over_columns: bool) -> Tensor | None:
        """The left factor of the second products (rows, columns); None for a dropped tile."""
        p_hat = self.filtered(block, filt, over_columns)
        if p_hat is None:
            return None
        kind, index = self.dtypes[Stage.DZ], block.index
        x = p_hat.to(kind) * self.g[index].to(kind)[:, None]
        if not self.variant.label_apart:
            here = torch.where(block.inside, self.target_term(index), x.gather(1, block.place).squeeze(1))
            x.scatter_(1, block.place, here[:, None])
        if block.slope is not None:
            x = x * block.slope.to(kind)
        return self.operand(x, block, filt) if Stage.DZ in self.stages else x

    def operand(self, x: Tensor, block: _Block, filt: Filter) -> Tensor:
        dtype, operand = self.problem.operand_dtype, self.variant.operand
        if operand is Operand.FP32 or dtype == x.dtype:
            return x
        rounded = x.to(dtype).to(x.dtype)
        if operand is Operand.SPLIT:
            return rounded + (x - rounded).to(dtype).to(x.dtype)
        if operand is Operand.FP32_ABOVE and filt:
            return torch.where(block.p < filt.threshold(dtype), rounded, x)
        return rounded

    def run(self) -> Result:
        problem, variant, kind = self.problem, self.variant, self.dtypes[Stage.PRODUCT]
        shared = variant.filter_e == variant.filter_c and variant.filter_e.kind is not FilterKind.SUBSET
        height, width = block_shape(problem, self.plan, variant.tile_ordered)
        d_e = _Sum(self, (problem.n, problem.d), variant.accum_e, problem.e.dtype)
        d_c = torch.empty(problem.v, problem.d, dtype=torch.float64)
        excess = torch.zeros(problem.n, dtype=kind)  # row sums of dZ, without the label
        counts = torch.zeros(2, problem.v, dtype=kind)
        for columns in column_blocks(problem, self.order, width):
            c = problem.c[columns.index].to(kind)
            sum_c = _Sum(self, (columns.width, problem.d), variant.accum_c, problem.c.dtype)
            for index in row_blocks(problem, self.rows, height):
                block = self.block(index, columns)
                y_e = self.dz(block, variant.filter_e, True)
                y_c = y_e if shared else self.dz(block, variant.filter_c, False)
                if y_e is not None:
                    d_e.add(index, y_e.to(kind) @ c)
                    excess[index] += y_e.to(kind).sum(1)
                    count_kept(counts, y_e, block.p, problem, variant.filter_e, index, columns)
                if y_c is not None:
                    sum_c.add(slice(None), y_c.to(kind).T @ problem.e[index].to(kind))
            self.add_label(columns, sum_c)
            d_c[columns.index] = sum_c.result()
        if variant.label_apart:
            centre = centres(counts, problem.c) if is_centred(problem, self.plan) else None
            for index in row_blocks(problem, self.rows, MOST_GATHERED):
                x = (self.target_term(index) * self.target_slope(index)).to(kind)
                part = x[:, None] * problem.c[problem.targets[index]].to(kind)
                if centre is not None:
                    part = part - (excess[index] + x)[:, None] * centre[as_ids(index, x) % 2]
                d_e.add(index, part)
        return Result(self.nll.double(), d_e.result(), d_c)

    def add_label(self, columns: Columns, sum_c: _Sum) -> None:
        """The target's terms of the tokens whose target is among these columns."""
        if not self.variant.label_apart:
            return
        tokens = ((self.targets >= columns.start) & (self.targets < columns.stop)).nonzero().squeeze(1)
        for index in tokens.split(MOST_GATHERED):
            x = (self.target_term(index) * self.target_slope(index)).to(self.dtypes[Stage.PRODUCT])
            sum_c.add_repeated(self.targets[index] - columns.start, x[:, None] * self.problem.e[index].to(x.dtype))


class _Sum:
    """A gradient under summation, and its rounding to the dtype of the result."""

    def __init__(self, of: _Tiled, shape: tuple[int, int], mode: Accumulation, dtype: torch.dtype) -> None:
        self.of, self.dtype, self.kind = of, dtype, of.dtypes[Stage.SUM]
        self.mode = mode if Stage.SUM in of.stages else Accumulation.FP32
        self.total = Accumulator(shape, self.mode, dtype, of.scale(Stage.SUM))

    def add(self, rows: slice | Tensor, value: Tensor) -> None:
        self.total.add(rows, value.to(self.kind))

    def add_repeated(self, rows: Tensor, value: Tensor) -> None:
        self.total.add_repeated(rows, value.to(self.kind))

    def result(self) -> Tensor:
        if self.mode is not Accumulation.FP32:
            return self.total.sum.double()
        last = self.of.scale(Stage.OUTPUT)
        total = self.total.sum.to(last.dtype) * last
        return (total.to(self.dtype) if Stage.OUTPUT in self.of.stages else total).double()
