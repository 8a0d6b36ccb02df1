"""What a variant's filter of dE keeps of each row, by one more pass over the logits."""

from __future__ import annotations

import torch
from torch import Tensor

from ..numerics import FilterKind, unit_roundoff
from ..problem import Heads, Plan, Problem, Statistics, Upstream, flushed_below
from ..promise import Seen, distances, row_norms
from .backward import Backward, as_ids, by_parity, centres, count_kept
from .filters import sampled, tile_survives
from .tiles import block_shape, column_blocks, row_blocks

__all__ = ["seen_of", "statistics"]


def statistics(problem: Problem, plan: Plan, heads: Heads, seed: Tensor) -> Statistics:
    """Kept mass, hits and the bound of the L1 deviation of P^ from P, for the filter of dE; zeros on ignored tokens.

    The deviation is inflated by a bound of the relative error of every computed probability (products in any order,
    Higham, Accuracy and Stability of Numerical Algorithms, section 3.1), so it holds for the exact softmax.
    """
    pass_ = Backward(problem, plan, heads, Upstream(heads.nll), seed)
    filt = plan.variant.filter_e
    eps = filt.threshold(problem.operand_dtype)
    mass, deviation = torch.zeros_like(heads.lse), torch.zeros_like(heads.lse)
    hits = torch.zeros_like(problem.targets)
    longest_c = heads.lse.new_zeros(())
    height, width = block_shape(problem, plan, by_tile=filt.by_tile)
    for columns in column_blocks(problem, pass_.order, width):
        c = problem.c[columns.index].to(problem.compute_dtype)
        longest_c = torch.maximum(longest_c, c.norm(dim=1).amax())
        for index in row_blocks(problem, pass_.rows, height):
            block = pass_.block(problem.e[index].to(problem.compute_dtype), c, index, columns)
            p = block.p
            p_t = torch.where(block.inside, torch.exp(-heads.nll[index]), 0)
            off_t = torch.zeros_like(p_t)
            if filt.by_tile:
                alive = tile_survives(p, pass_.complement[index], block.inside, eps)
                p_hat, off_t, p_t = (
                    p * alive,
                    torch.where(block.inside & ~alive, pass_.complement[index], 0),
                    p_t * alive,
                )
            elif filt.kind is FilterKind.NONE:
                p_hat = p
            else:
                first = problem.first_column
                ids = as_ids(columns.index, p) + first
                p_hat = sampled(p, filt, eps, seed, as_ids(index, p), columns, ids, True, first)
            mass[index] += p_hat.sum(1) + p_t
            hits[index] += (p_hat > 0).sum(1) + (p_t > 0)
            deviation[index] += (p_hat - p).abs_().sum(1) + off_t
    if not filt:  # the kernels may flush what weighs so much at most
        most = (1 + 2.0**-10) * flushed_below(problem, plan) * problem.v
        return Statistics(mass, hits, deviation + most * torch.where(problem.targets >= 0, pass_.complement, 0))
    return Statistics(mass, hits, _inflate(problem, heads, deviation, longest_c))


def seen_of(pass_: Backward) -> Seen:
    """What a pass under a filter of single entries, the same for both gradients, tells of it, without entropy."""
    problem, heads, filt, seed = pass_.problem, pass_.heads, pass_.variant.filter_e, pass_.seed
    eps, first, alpha = filt.threshold(problem.operand_dtype), problem.first_column, pass_.factors.alpha
    mass = torch.exp(-heads.nll)
    energy_c, squares, counts = heads.lse.new_zeros(()), *(heads.lse.new_zeros(2, problem.v) for _ in range(2))
    norms_e, norms_c = row_norms(problem)
    height, width = block_shape(problem, Plan(pass_.variant), by_tile=False)
    for columns in column_blocks(problem, pass_.order, width):
        c = problem.c[columns.index].to(problem.compute_dtype)
        for index in row_blocks(problem, pass_.rows, height):
            e = problem.e[index].to(problem.compute_dtype)
            block = pass_.block(e, c, index, columns)
            small, ids, tokens = block.p < eps, as_ids(columns.index, block.p) + first, as_ids(index, block.p)
            mass[index] += torch.where(small, 0, block.p).sum(1)
            for_e, for_c = (
                sampled(block.p, filt, eps, seed, tokens, columns, ids, over_columns, first)
                for over_columns in (True, False)
            )
            count_kept(counts, for_e * alpha[index][:, None], block.p, problem, filt, index, columns)
            factor = alpha[index][:, None] if block.slope is None else alpha[index][:, None] * block.slope
            drawn_e, drawn_c = (torch.where(small, x, 0) * factor for x in (for_e, for_c))
            squares[:, columns.index] += by_parity(drawn_e.square(), tokens)
            energy_c += (drawn_c * norms_e[index][:, None]).square().sum()
    if pass_.centred:
        norms_c = torch.stack([_from(centre, problem.c, norms_c) for centre in centres(counts, problem.c)])
    return Seen(alpha, mass, (squares * norms_c.square()).sum(), energy_c, (norms_e, norms_c))


def _from(centre: Tensor, c: Tensor, norms: Tensor) -> Tensor:
    """(V,) distances of the rows of c (V, D), of these norms, from a centre."""
    along = torch.cat([rows.to(centre.dtype) @ centre for rows in c.split(1024)])
    return distances(norms, along, centre)


def _inflate(problem: Problem, heads: Heads, deviation: Tensor, longest_c: Tensor) -> Tensor:
    """An upper bound of the exact deviation from the computed one."""
    u = unit_roundoff(problem.compute_dtype)
    longest_e = torch.zeros_like(heads.lse)
    for index in row_blocks(problem, torch.arange(problem.n, device=problem.e.device), 1024):
        longest_e[index] = torch.nan_to_num(problem.e[index].to(longest_e.dtype)).norm(dim=1)
    logit = (
        1.01 * (problem.d + 4) * u * longest_e * longest_c / problem.temperature
    )  # error of one logit, both e and lse see it
    logit += 8 * u * heads.lse.abs()
    if problem.bias is not None:
        logit += 4 * u * problem.bias.to(logit.dtype).abs().amax() / problem.temperature
    relative = torch.expm1(2 * logit + (problem.v + 16) * u)
    # P^ - P moves by at most `relative` of the mass that the filter touches, and an entry within it of eps may change
    # sides.
    return torch.where(problem.targets >= 0, deviation * (1 + relative) + 2 * relative, 0)
