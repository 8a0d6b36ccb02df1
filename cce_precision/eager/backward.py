"""The backward pass: the logits again, block by block, and the two second products, as the variant's record says.

Order of work: for each run of columns, for each block of tokens. So dC of a run of columns is complete before it is
rounded, and dE collects one contribution a run; both in the order of the tiles, which is what low-precision sums depend
on.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..numerics import Filter, FilterKind, Operand, power_of_two
from ..problem import Heads, Plan, Problem, Upstream, is_centred, is_witness
from .accumulate import Accumulator
from .filters import sampled, tile_survives
from .tiles import (
    Columns,
    block_logits,
    block_shape,
    column_blocks,
    local_targets,
    row_blocks,
    valid_rows,
    vocabulary_order,
)

__all__ = ["backward", "by_parity", "centres", "count_kept"]

NEGLIGIBLE = -1024.0  # exp of less is 0 in fp64 too
MOST_GATHERED = 1024  # tokens whose rows are gathered at a time


@dataclass(frozen=True)
class RowFactors:
    """The upstream gradient of each token, divided by one power of two so that dZ is O(1); all (N,) in the compute
    dtype."""

    alpha: Tensor  # factor of P
    beta: Tensor  # factor of the one-hot target
    kappa: Tensor | None  # factor of the entropy's term
    sigma: Tensor | None  # factor of the column weights
    scale: Tensor  # 0-dim, the power of two

    @staticmethod
    def of(upstream: Upstream, total_weight: Tensor | float, rows: Tensor, like: Tensor) -> RowFactors:
        zero = torch.zeros_like(like)
        nll, lse, smooth = (
            zero if g is None else g.to(like.dtype) for g in (upstream.nll, upstream.lse, upstream.smooth)
        )
        alpha = nll + lse + total_weight * smooth
        kappa = None if upstream.entropy is None else upstream.entropy.to(like.dtype)
        sigma = None if upstream.smooth is None else smooth
        factors = [alpha, nll] + [f for f in (kappa, sigma) if f is not None]
        scale = power_of_two(torch.stack([f[rows] for f in factors]))
        divide = lambda f: None if f is None else f / scale  # noqa: E731
        return RowFactors(alpha / scale, nll / scale, divide(kappa), divide(sigma), scale)


@dataclass(frozen=True)
class Block:
    """The softmax of one block of tokens and columns, and where its targets are."""

    index: slice | Tensor  # of the tokens in e
    columns: Columns
    p: Tensor  # (rows, columns) probabilities, 0 at the targets
    log_p: Tensor  # (rows, columns)
    slope: Tensor | None  # (rows, columns) of the softcap
    inside: Tensor  # (rows,) whether the target is among these columns
    place: Tensor  # (rows, 1) where


class Backward:
    """One backward call: what all its blocks share."""

    def __init__(self, problem: Problem, plan: Plan, heads: Heads, upstream: Upstream, seed: Tensor) -> None:
        self.problem, self.variant, self.heads, self.seed = problem, plan.variant, heads, seed
        self.partial_e = plan.partial_e
        weight = problem.column_weight
        self.rows = valid_rows(problem)
        total_weight = float(problem.v) if weight is None else weight.sum()
        self.factors = RowFactors.of(upstream, total_weight, self.rows, heads.lse)
        self.scale = self.factors.scale / problem.temperature
        self.order = vocabulary_order(problem, self.variant, self.rows)
        self.targets = problem.positions(self.order)
        self.complement = -torch.expm1(-heads.nll)  # 1 - P_t
        # What a tile filter compares at the target: |P - onehot|, and P too where a head beside nll has a gradient.
        self.at_target = self.complement if upstream.of_nll_alone else self.complement.maximum(torch.exp(-heads.nll))
        # Without a softcap the smoothing part -sigma_i w_j is rank one and stays out of the operand.
        self.smooth_apart = self.factors.sigma is not None and problem.softcap is None
        self.smooth_inside = self.factors.sigma is not None and problem.softcap is not None
        self.centred = is_centred(problem, plan)

    def weight(self, columns: Columns) -> Tensor:
        """Column weights (columns,) of the smoothing part."""
        weight = self.problem.column_weight
        return self.complement.new_ones(columns.width) if weight is None else weight[columns.index]

    def block(self, e: Tensor, c: Tensor, index: slice | Tensor, columns: Columns) -> Block:
        log_p, slope = block_logits(self.problem, e, c, columns)
        log_p -= self.heads.lse[index][:, None]
        p = torch.exp(log_p)
        inside, place = local_targets(self.targets[index], columns)
        place = place[:, None]
        p.scatter_(1, place, torch.where(inside[:, None], 0, p.gather(1, place)))
        return Block(index, columns, p, log_p, slope, inside, place)

    def target_term(self, index: slice | Tensor) -> Tensor:
        """The target's entry of dZ (rows,) in complement form, before the slope."""
        f, nll = self.factors, self.heads.nll[index]
        p_t = torch.exp(-nll)
        x = (f.alpha[index] - f.beta[index]) * p_t - f.beta[index] * self.complement[index]
        if f.kappa is not None:
            x -= f.kappa[index] * (self.heads.entropy[index] - nll.clamp(max=-NEGLIGIBLE)) * p_t
        return x

    def target_slope(self, index: slice | Tensor) -> Tensor | float:
        """The softcap's slope at the target's logit, which is lse - nll."""
        if self.problem.softcap is None:
            return 1.0
        z_t = (self.heads.lse[index] - self.heads.nll[index]) * self.problem.temperature
        return 1 - (z_t / self.problem.softcap) ** 2

    def dz(self, block: Block, filt: Filter, over_columns: bool) -> Tensor | None:
        """dZ (rows, columns) under one filter, O(1) and unrounded; None for a dropped tile."""
        f, index, columns = self.factors, block.index, block.columns
        p, label = block.p, None if self.variant.label_apart else self.target_term(index)
        eps = filt.threshold(self.problem.operand_dtype)
        if filt.by_tile:
            if not tile_survives(p, self.at_target[index], block.inside, eps):
                if not self.smooth_inside:
                    return None
                p, label = torch.zeros_like(p), None  # the smoothing part is never filtered
        elif filt:
            first = self.problem.first_column
            ids = as_ids(columns.index, p) + first
            p = sampled(p, filt, eps, self.seed, as_ids(index, p), columns, ids, over_columns, first)
        x = p * f.alpha[index][:, None]
        if f.kappa is not None:
            spread = block.log_p.clamp(min=NEGLIGIBLE) + self.heads.entropy[index][:, None]
            x -= p * (f.kappa[index][:, None] * spread)
        if label is not None:
            x.scatter_(1, block.place, torch.where(block.inside, label, x.gather(1, block.place).squeeze(1))[:, None])
        if self.smooth_inside:
            assert f.sigma is not None
            x -= f.sigma[index][:, None] * self.weight(columns)
        return x if block.slope is None else x.mul_(block.slope)

    def operand(self, x: Tensor, block: Block, filt: Filter) -> Tensor:
        """dZ as the second products see it, in the compute dtype."""
        dtype, kind = self.problem.operand_dtype, self.variant.operand
        if kind is Operand.FP32 or dtype == x.dtype:
            return x
        rounded = x.to(dtype).to(x.dtype)
        if kind is Operand.SPLIT:
            return rounded + (x - rounded).to(dtype).to(x.dtype)  # exact: hi + lo has at most 24 bits
        if kind is Operand.FP32_ABOVE and filt:
            return torch.where(block.p < filt.threshold(dtype), rounded, x)
        return rounded

    def run(
        self, height: int, width: int, need: tuple[bool, bool, bool]
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """All gradients asked for, in blocks of (height, width)."""
        problem, variant, dtype = self.problem, self.variant, self.problem.compute_dtype
        need_e, need_c, need_bias = need
        shared = variant.filter_e == variant.filter_c and variant.filter_e.kind is not FilterKind.SUBSET
        d_e = Accumulator((problem.n, problem.d), variant.accum_e, problem.e.dtype, self.scale) if need_e else None
        d_c = torch.empty_like(problem.c, memory_format=torch.contiguous_format) if need_c else None
        d_bias = torch.zeros(problem.v, dtype=dtype, device=problem.c.device) if need_bias else None
        weighted_c = problem.e.new_zeros(problem.d, dtype=dtype)  # sum_j w_j c_j
        row_sums = problem.e.new_zeros(problem.n, dtype=dtype)  # of dZ under the filter of dE, without the label
        counts = problem.e.new_zeros(2, problem.v, dtype=dtype) if self.centred else None
        weighted_e = self.weighted_embeddings() if self.smooth_apart and need_c else None

        for columns in column_blocks(problem, self.order, width):
            c = problem.c[columns.index].to(dtype)
            sum_c = (
                Accumulator((columns.width, problem.d), variant.accum_c, problem.c.dtype, self.scale)
                if need_c
                else None
            )
            bias_sum = c.new_zeros(columns.width)
            for index in row_blocks(problem, self.rows, height):
                e = problem.e[index].to(dtype)
                block = self.block(e, c, index, columns)
                x_e = self.dz(block, variant.filter_e, True) if need_e or shared else None
                x_c = x_e if shared else self.dz(block, variant.filter_c, False) if need_c or need_bias else None
                y_e = None if x_e is None else self.operand(x_e, block, variant.filter_e)
                if d_e is not None and y_e is not None:
                    d_e.add(index, y_e @ c)
                    if counts is not None:
                        row_sums[index] += y_e.sum(1)
                        count_kept(counts, y_e, block.p, problem, variant.filter_e, index, columns)
                if x_c is not None:
                    bias_sum += x_c.sum(0)
                    if sum_c is not None:
                        y_c = y_e if shared and y_e is not None else self.operand(x_c, block, variant.filter_c)
                        sum_c.add(slice(None), y_c.T @ e)
            self.add_label_apart(columns, sum_c, bias_sum)
            if self.smooth_apart:
                weight = self.weight(columns)
                weighted_c += weight @ c
                bias_sum -= weight * self.factors.sigma[self.rows].sum()  # type: ignore[index]
                if sum_c is not None and weighted_e is not None:
                    sum_c.add(slice(None), -weight[:, None] * weighted_e)
            if d_c is not None and sum_c is not None:
                d_c[columns.index] = sum_c.result()
            if d_bias is not None:
                d_bias[columns.index] = bias_sum
        if d_e is not None:
            self.finish_embeddings(d_e, weighted_c, row_sums, None if counts is None else centres(counts, problem.c))
        return (
            None if d_e is None else d_e.result(self.partial_e),
            d_c,
            None if d_bias is None or problem.bias is None else d_bias.mul_(self.scale).to(problem.bias.dtype),
        )

    def weighted_embeddings(self) -> Tensor:
        """sum_i sigma_i e_i (D,)."""
        total = self.complement.new_zeros(self.problem.d)
        for index in row_blocks(self.problem, self.rows, MOST_GATHERED):
            total += self.factors.sigma[index] @ self.problem.e[index].to(total.dtype)  # type: ignore[index]
        return total

    def add_label_apart(self, columns: Columns, sum_c: Accumulator | None, bias_sum: Tensor) -> None:
        """The target's terms of the tokens whose target is among these columns, in fp32."""
        if not self.variant.label_apart:
            return
        tokens = ((self.targets >= columns.start) & (self.targets < columns.stop)).nonzero().squeeze(1)
        for index in tokens.split(MOST_GATHERED):
            x = self.target_term(index) * self.target_slope(index)
            place = self.targets[index] - columns.start
            bias_sum.index_add_(0, place, x)
            if sum_c is not None:
                sum_c.add_repeated(place, x[:, None] * self.problem.e[index].to(x.dtype))

    def finish_embeddings(self, d_e: Accumulator, weighted_c: Tensor, row_sums: Tensor, centre: Tensor | None) -> None:
        """The parts of dE that stay out of the operand: the target's, the smoothing's and the centre's."""
        if not (self.variant.label_apart or self.smooth_apart):
            return
        for index in row_blocks(self.problem, self.rows, MOST_GATHERED):
            part = self.complement.new_zeros(())
            if self.variant.label_apart:
                x = self.target_term(index) * self.target_slope(index)
                targets = self.problem.targets[index]
                here = targets < self.problem.v
                part = x[:, None] * self.problem.c[torch.where(here, targets, 0)].to(x.dtype)
                part = torch.where(here[:, None], part, 0)  # not the target's term of another process's column
                if centre is not None:
                    excess = row_sums[index] + x - (self.factors.alpha[index] - self.factors.beta[index])
                    part = part - excess[:, None] * centre[as_ids(index, x) % 2]
            if self.smooth_apart:
                part = part - self.factors.sigma[index][:, None] * weighted_c  # type: ignore[index]
            d_e.add(index, part)


def count_kept(
    counts: Tensor,
    x: Tensor,  # (rows, columns) of dZ
    p: Tensor,  # (rows, columns) probabilities
    problem: Problem,
    filt: Filter,
    index: slice | Tensor,
    columns: Columns,
) -> None:
    """counts (2, V) += how many entries are kept, by column, for the even and odd tokens that make the centres."""
    tokens = as_ids(index, x)
    kept = (x != 0) & ~(p < filt.kept_from(problem.operand_dtype)) & is_witness(tokens, problem.n)[:, None]
    counts[:, columns.index] += by_parity(kept.to(counts.dtype), tokens)


def by_parity(x: Tensor, tokens: Tensor) -> Tensor:
    """(2, columns): the sums of the rows of x (rows, columns) of even and of odd tokens."""
    return x.new_zeros(2, x.shape[1]).index_add_(0, tokens % 2, x)


def centres(counts: Tensor, c: Tensor) -> Tensor:
    """(2, D): what even and odd tokens take from the rows of c (V, D), the mean row of what is kept for the others; 0
    where nothing is. See `numerics.Variant`.
    """
    total = counts.new_zeros(2, c.shape[1])
    for part, rows in zip(counts.split(MOST_GATHERED, 1), c.split(MOST_GATHERED)):
        total += part @ rows.to(total.dtype)
    return (total / counts.sum(1, keepdim=True).clamp(min=1)).flip(0)


def as_ids(index: slice | Tensor, like: Tensor) -> Tensor:
    """The numbers that an index stands for, (k,) int64."""
    return index if isinstance(index, Tensor) else torch.arange(index.start, index.stop, device=like.device)


def backward(
    problem: Problem,
    plan: Plan,
    heads: Heads,
    upstream: Upstream,
    need: tuple[bool, bool, bool],
    seed: Tensor,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(dE, dC, dbias) in the dtypes of e (the compute dtype for plan.partial_e), c and bias; None where `need` says so.
    `seed`: 0-dim int64, for random filters."""
    by_tile = plan.variant.tile_ordered
    return Backward(problem, plan, heads, upstream, seed).run(*block_shape(problem, plan, by_tile), need)
