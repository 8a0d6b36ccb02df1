"""The forward pass: the heads of every token by an online softmax over column blocks, the target's logit kept apart.

Source: online softmax, Milakov and Gimelshein, arXiv 1805.02867; the complement form, log1p of the odds against the
target, keeps nll and 1 - P_t to a few ulp however confident the row is (Blanchard, Higham and Higham, doi
10.1093/imanum/draa038).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..problem import Heads, Plan, Problem
from .tiles import Columns, block_logits, block_shape, column_blocks, local_targets, row_blocks, valid_rows

__all__ = ["forward"]


@dataclass
class OnlineSoftmax:
    """Running statistics of some rows over every column but the target, relative to the running maximum m."""

    m: Tensor  # (rows,) maximum, -inf before the first column
    s: Tensor  # (rows,) sum exp(z - m)
    a: Tensor | None  # (rows,) sum exp(z - m) (m - z), for the entropy

    @staticmethod
    def start(rows: int, like: Tensor, entropy: bool) -> OnlineSoftmax:
        zero = like.new_zeros(rows)
        return OnlineSoftmax(zero - torch.inf, zero, zero.clone() if entropy else None)

    def update(self, z: Tensor) -> None:
        """Takes in a block z (rows, columns), which it overwrites. -inf entries count as probability 0."""
        m = torch.maximum(self.m, z.amax(1))
        reference = torch.where(m == -torch.inf, 0, m)  # a row of -inf alone must not become NaN
        decay = torch.exp(self.m - reference)
        below = z.sub_(reference[:, None])
        p = torch.exp(below) if self.a is not None else below.exp_()
        if self.a is not None:
            step = torch.where(self.m == -torch.inf, 0, reference - self.m)
            self.a = decay * (self.a + self.s * step) - (p * below.clamp_(min=-1024)).sum(1)
        self.s = decay * self.s + p.sum(1)
        self.m = m


def _finish(state: OnlineSoftmax, z_t: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """nll, lse and entropy from the statistics of the other columns and the target's logit z_t (rows,)."""
    rest = state.m + torch.log(state.s)  # lse over j != t; -inf where nothing is left
    top = torch.maximum(rest, z_t)
    gap = rest - z_t
    tail = torch.log1p(torch.exp(-gap.abs()))
    nll, lse = gap.clamp(min=0) + tail, top + tail
    if state.a is None:
        return nll, lse, None
    m = torch.maximum(state.m, z_t)
    decay = torch.exp(state.m - m)
    shift = torch.where(state.m == -torch.inf, 0, m - state.m)
    p_t = torch.exp(z_t - m)
    below_t = torch.where(p_t > 0, m - z_t, 0)
    total = decay * state.s + p_t
    return nll, lse, torch.log(total) + (decay * (state.a + state.s * shift) + p_t * below_t) / total


def forward(problem: Problem, plan: Plan) -> Heads:
    """The heads of `problem`; those that the plan does not ask for are empty."""
    dtype, device = problem.compute_dtype, problem.e.device
    zeros = lambda wanted: torch.zeros(problem.n if wanted else 0, dtype=dtype, device=device)  # noqa: E731
    nll, lse = zeros(True), zeros(True)
    entropy, smooth = zeros(plan.want_entropy), zeros(plan.want_smooth)
    argmax = torch.zeros(problem.n if plan.want_argmax else 0, dtype=torch.int64, device=device)
    height, width = block_shape(problem, plan, by_tile=False)
    weight = problem.column_weight
    total_weight = problem.v if weight is None else weight.sum()

    for index in row_blocks(problem, valid_rows(problem), height):
        e, targets = problem.e[index].to(dtype), problem.targets[index]
        state = OnlineSoftmax.start(targets.numel(), e, plan.want_entropy)
        z_t = e.new_zeros(targets.numel())
        best, where = torch.full_like(z_t, -torch.inf), torch.zeros_like(targets)
        offset, weighted = (
            None,
            torch.zeros_like(z_t),
        )  # sum_j w_j (z_j - offset), so that a common offset cancels first
        for columns in column_blocks(problem, None, width):
            z, _ = block_logits(problem, e, problem.c[columns.index].to(dtype), columns)
            if plan.want_argmax:
                best, where = _update_argmax(best, where, z, columns)
            if plan.want_smooth:
                if offset is None:
                    offset = torch.nan_to_num(z.amax(1), nan=0.0, posinf=0.0, neginf=0.0)
                centred = z - offset[:, None]
                weighted += centred.sum(1) if weight is None else centred @ weight[columns.index]
            inside, place = local_targets(targets, columns)
            here = z.gather(1, place[:, None])
            z_t = torch.where(inside, here.squeeze(1), z_t)
            z.scatter_(1, place[:, None], torch.where(inside[:, None], -torch.inf, here))
            state.update(z)
        nll[index], lse[index], h = _finish(state, z_t)
        if h is not None:
            entropy[index] = h
        if plan.want_smooth and offset is not None:
            smooth[index] = total_weight * (lse[index] - offset) - weighted
        if plan.want_argmax:
            argmax[index] = where
    return Heads(nll, lse, entropy, smooth, argmax)


def _update_argmax(best: Tensor, where: Tensor, z: Tensor, columns: Columns) -> tuple[Tensor, Tensor]:
    """The largest logit so far and its column; the lowest column among equals. NaN counts as largest, as in
    torch.argmax."""
    value = z.amax(1)
    same = (z == value[:, None]) | z.isnan()
    first = same.to(torch.int32).argmax(1) + columns.start
    better = (value > best) | (value.isnan() & ~best.isnan())
    return torch.where(better, value, best), torch.where(better, first, where)
