"""Bounds of a vocabulary-parallel call: what sharing the columns adds to the bounds of one process.

    parallel_bound(problem, plan, shares, objective) -> Quantities

The heads of the whole are formed in fp64 from those of the shares and rounded once (`parallel.Shares`), so their errors
are those of the shares, propagated. The gradients are those of one process with these heads, but in tiles and in an
order that depend on the shares: what a sum in the input's dtype loses, and what a filter by tile or by place in the
visiting order changes, is therefore bounded for every order. dE gains the fp32 sum over the processes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from cce_precision.analysis.bounds import CPU, INFLATION, Call, Machine
from cce_precision.analysis.bounds_gradients import Rows
from cce_precision.analysis.bounds_model import LARGEST_EXPONENT, Computed, half_ulp
from cce_precision.analysis.bounds_softmax import Softmax
from cce_precision.analysis.references import Objective, Quantities, magnitudes
from cce_precision.numerics import NO_FILTER, Accumulation, Filter, FilterKind, Variant, unit_roundoff
from cce_precision.problem import Plan, Problem

__all__ = ["parallel_bound"]


def _depends_on_order(filt: Filter) -> bool:
    return filt.by_tile or filt.kind is FilterKind.SUBSET


def _free_of_order(variant: Variant) -> Variant:
    """The variant without what depends on the order of columns: fp32 sums, element filters alone."""
    keep = lambda filt: NO_FILTER if _depends_on_order(filt) else filt  # noqa: E731
    return dataclasses.replace(
        variant,
        filter_e=keep(variant.filter_e),
        filter_c=keep(variant.filter_c),
        accum_e=Accumulation.FP32,
        accum_c=Accumulation.FP32,
        sort_vocabulary=False,
        centred=False,
        flushed=False,
    )


class _SharedCall(Call):
    """A call whose heads come from shares [start, stop) of the columns."""

    def __init__(
        self, problem: Problem, plan: Plan, objective: Objective, machine: Machine, shares: Sequence[tuple[int, int]]
    ) -> None:
        super().__init__(problem, plan, objective, machine)
        self.shares = [share for share in shares if share[0] < share[1]]

    def rows(self) -> Iterator[Rows]:
        for rows in super().rows():
            yield dataclasses.replace(rows, softmax=self._shared(rows))

    def _of_share(self, rows: Rows, start: int, stop: int) -> Softmax:
        part = slice(start, stop)
        problem = dataclasses.replace(self.problem, c=self.problem.c[part])
        inside = (rows.targets >= start) & (rows.targets < stop)
        targets = torch.where(inside, rows.targets - start, 0)
        bias = None if self.bias is None else self.bias[part]
        return self.softmax(problem, rows.e, self.c[part], bias, targets, self.weight[part])

    def _shared(self, rows: Rows) -> Softmax:
        """The whole softmax, its heads with the errors that those of the shares leave."""
        whole, p, targets = rows.softmax, self.p, rows.targets
        parts = [self._of_share(rows, *share) for share in self.shares]
        stack = lambda name: Computed(  # noqa: E731
            torch.stack([getattr(x, name).value for x in parts]), torch.stack([getattr(x, name).error for x in parts])
        )
        lse, nll, entropy, smooth = (stack(name) for name in ("lse", "nll", "entropy", "smooth"))
        nothing = lse.value == -torch.inf  # all of a share is masked
        lse, nll, entropy, smooth = (
            Computed(torch.where(nothing, x.value.nan_to_num(), x.value), torch.where(nothing, 0, x.error))
            for x in (lse, nll, entropy, smooth)
        )
        own = torch.stack([(targets >= a) & (targets < b) for a, b in self.shares])  # (shares, B)
        rounded = lambda value, error: Computed(value, error + half_ulp(value.abs() + error, p.dtype))  # noqa: E731

        off = lse.error.amax(0)  # of a log-sum-exp: log sum_r q_r exp(error_r)
        new_lse = rounded(whole.lse.value, off)
        growth = lambda x: torch.expm1(x.clamp(max=LARGEST_EXPONENT))  # noqa: E731
        z_t = torch.where(own, lse.value - nll.value, 0).sum(0)
        z_off = torch.where(own, lse.error + nll.error, 0).sum(0)
        # exp(nll) is the sum of the own share's and of the odds of the others
        terms = torch.softmax(torch.where(own, nll.value, lse.value - z_t), 0)
        off_terms = growth(torch.where(own, nll.error, lse.error + z_off))
        relative = (terms * off_terms).sum(0).nan_to_num(nan=math.inf)
        nll_error = torch.where(relative < 0.5, -torch.log1p(-relative.clamp(max=0.5)), torch.inf)
        nll_error = torch.where(whole.nll.value.isinf(), 0, nll_error)
        new_nll = rounded(whole.nll.value, nll_error)
        moved = (torch.exp(-whole.nll.value) * growth(new_nll.error)).clamp(max=1.0)
        value = whole.complement.value
        complement = Computed(value, moved + p.function * (value + moved) + p.tiny)

        q = torch.exp(lse.value - whole.lse.value)
        below = torch.where(q > 0, whole.lse.value - lse.value, 0)
        change = growth(off + lse.error)  # of q
        entropy_off = q * ((1 + change) * (entropy.error + off + lse.error) + change * (entropy.value + below).abs())
        weights = torch.stack([self.weight[a:b].abs().sum() for a, b in self.shares])[:, None]
        smooth_off = smooth.error + weights * (off + lse.error)
        # of kernels, P's error has the lse's own arithmetic alone: errors of the logits move both at once
        counted = whole.lse.error if self.machine.kernels is None else 0.0
        add = (1 + 2.0**-20) * (new_lse.error - counted).clamp(min=0)[:, None]
        log_p = Computed(whole.log_p.value, whole.log_p.error + add)
        return dataclasses.replace(
            whole,
            log_p=log_p,
            p=log_p.exp(p),
            p_lse=log_p.exp(p),
            nll=new_nll,
            lse=new_lse,
            complement=complement,
            entropy=rounded(whole.entropy.value, entropy_off.sum(0)),
            smooth=rounded(whole.smooth.value, smooth_off.sum(0).nan_to_num(nan=0.0)),
        )


def _filtered_mass(call: Call, filt: Filter) -> Iterator[tuple[Rows, Tensor]]:
    """Rows, and (B, V) bounds of what a filter that depends on the order can change in dZ, whatever the order."""
    factors, scale = call.factors(), 1 / call.problem.temperature
    eps = filt.threshold(call.problem.operand_dtype)
    share = filt.share - 1 if filt.kind is FilterKind.SUBSET else 1
    for rows in call.rows():
        s, f = rows.softmax, factors.at(rows.place)
        target = rows.targets[:, None]
        spread = torch.zeros_like(s.p.value) if f.entropy is None else (s.log_p.value + s.entropy.value[:, None]).abs()
        kappa = 0.0 if f.entropy is None else f.entropy.upper[:, None]
        x = share * s.p.upper * (f.alpha.upper[:, None] + kappa * spread) * (s.p.value - s.p.error < eps * (1 + 1e-6))
        at_target = torch.zeros_like(f.alpha.value)
        if filt.by_tile:
            x_t = f.nll.upper * s.complement.upper + f.rest.upper * s.p.upper.gather(1, target)[:, 0]
            x_t = x_t + (s.p.upper * kappa * spread).gather(1, target)[:, 0]
            at_target = x_t * (s.complement.value - s.complement.error < eps * (1 + 1e-6))
        yield rows, x.scatter(1, target, at_target[:, None]) * scale


def _lost(accum: Accumulation, size: Tensor, tiles: int, dtype: torch.dtype) -> Tensor:
    """What a sum of `tiles` contributions loses in `accum` beyond one rounding, in any order; `size` bounds their
    absolute sum. Shared between processes or not."""
    if accum is Accumulation.FP32:
        return torch.zeros_like(size)
    u, info = unit_roundoff(dtype), torch.finfo(dtype)
    underflow = 4 * (tiles + 1) * info.smallest_normal * u  # a rounding in the subnormal range, four a contribution
    if accum is Accumulation.INPUT:
        return u * (1 + tiles * (1 + u)) * size + underflow
    grown = size * (1 + 2 * u + u * u) / (1 - u - tiles * u * u)
    return u * ((2 + u) * size + tiles * u * grown) + u * size + underflow


def parallel_bound(
    problem: Problem,
    plan: Plan,
    shares: Sequence[tuple[int, int]],
    objective: Objective | None = None,
    *,
    seed: int = 0,
    machine: Machine = CPU,
) -> Quantities:
    """Elementwise bounds of the error of a vocabulary-parallel call; see `bounds.bound`.

    Args:
        problem: the whole problem, as one process would see it.
        plan: the variant and the workspace.
        shares: rows [start, stop) of each process.
        objective, seed, machine: as in `bounds.bound`.
    """
    objective = Objective() if objective is None else objective
    variant, world = plan.variant, len(shares)
    call = _SharedCall(problem, dataclasses.replace(plan, variant=_free_of_order(variant)), objective, machine, shares)
    call.forward()
    gradients = call.gradients(torch.full((), seed, dtype=torch.int64))
    size, u, stored = magnitudes(problem, objective), call.p.u, unit_roundoff(problem.operand_dtype)

    def spread(x: Tensor) -> Tensor:
        """(N, ...) of the valid tokens' (M, ...)."""
        return torch.zeros(problem.n, *x.shape[1:], dtype=torch.float64).index_copy(0, call.valid, x)

    d_e, d_c, d_bias = spread(gradients.d_e), gradients.d_c, gradients.d_bias
    if call.tiled:
        if _depends_on_order(variant.filter_e):
            for rows, x in _filtered_mass(call, variant.filter_e):
                d_e[rows.index] += x @ call.c.abs()
        if _depends_on_order(variant.filter_c):
            for rows, x in _filtered_mass(call, variant.filter_c):
                d_c, d_bias = d_c + x.T @ rows.e.abs(), d_bias + x.sum(0)
        (height, width), columns = variant.tile, [b - a for a, b in shares]
        d_e = d_e + _lost(variant.accum_e, size.dE + d_e, sum(-(-v // width) for v in columns) + 1, problem.e.dtype)
        d_c = d_c + _lost(variant.accum_c, size.dC + d_c, -(-problem.n // height), problem.c.dtype)
        rest = 4 * u  # alpha with the other processes' column weights
    else:
        d_e = d_e + stored * (size.dE + d_e)  # each process's part is rounded
        rest = 32 * u  # P as a product of the share's softmax and its weight, through the formulas of the heads
    d_e = d_e + (world + rest / u) * u * (size.dE + d_e)
    d_c, d_bias = d_c + rest * (size.dC + d_c), d_bias + rest * (size.dbias + d_bias)
    losses, value = call.losses(), call.value(call.losses()).error
    heads = {name: spread(call.head(name).error) for name in ("nll", "lse", "entropy", "smooth")}
    result = heads | {
        "loss": spread(losses.error),
        "value": spread(value) if objective.reduction == "none" else value,
        "p_complement": spread(call.head("complement").error),
        "dE": d_e,
        "dC": d_c,
        "dbias": d_bias,
    }
    return Quantities(**{name: (x * INFLATION).nan_to_num(nan=math.inf, posinf=math.inf) for name, x in result.items()})
