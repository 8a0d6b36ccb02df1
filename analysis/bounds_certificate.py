"""Bounds of what a filter alone does: over all draws of a random one, or from a kernel's statistics without a truth."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from cce_precision.analysis.bounds import Call
from cce_precision.analysis.bounds_model import CPU, Computed, Machine
from cce_precision.analysis.references import Objective
from cce_precision.numerics import Filter, FilterKind
from cce_precision.problem import Plan, Problem, is_centred

__all__ = ["Certificate", "Sampling", "certificate", "dropped_mass", "sampling"]


class Sampling(NamedTuple):
    """What random filters add to the gradients, whatever the seed; fp64."""

    d_e: Tensor  # (N, D) bound of the deviation from the gradient without a filter
    d_c: Tensor  # (V, D)
    variance_e: Tensor  # (N, D) variance of an entry over the seeds; of a centred variant at most
    variance_c: Tensor  # (V, D)


def sampling(
    problem: Problem, plan: Plan, objective: Objective | None = None, *, delta: float = 1e-6, machine: Machine = CPU
) -> Sampling:
    """Bernstein bounds of the random filters of a plan: all entries obey them at once with probability 1 - delta.

    An entry is a sum of independent terms a_j = (P^_j - P_j) w_j of mean 0, with w_j the factor that multiplies P^_j
    (in dE of a centred variant c_j less the centre, which the draws of other tokens decide: the worst that it may be).
    With v the sum of their variances, b their largest magnitude and L = log(2 entries / delta): |error| <= bL/3 +
    sqrt((bL/3)^2 + 2vL). Stochastic: variance P (eps - P) w^2, b = eps max |w|. Subsets: the terms are groups of
    `share` neighbours, of which one is drawn; variance at most (share - 1) sum P^2 w^2 plus what neighbours differ
    by, b at most 2 (share - 1) max P |w|.

    For exact probabilities; the roundings come on top. Zero for filters that are not random.
    Source: Boucheron, Lugosi and Massart, Concentration inequalities, corollary 2.11.
    """
    call = Call(problem, plan, Objective() if objective is None else objective, machine)
    call.forward()
    factors, c, scale = call.factors(), call.c, 1 / problem.temperature
    n, v, d = problem.n, problem.v, problem.d
    variant, zeros = plan.variant, lambda *shape: torch.zeros(shape, dtype=torch.float64, device=c.device)
    d_e, variance_e, variance_c, largest_c = zeros(n, d), zeros(n, d), zeros(v, d), zeros(v, d)
    log = math.log(2 * max(n * d + v * d, 1) / delta)
    met = _met(c, is_centred(problem, plan))
    eps_e, eps_c = (f.threshold(problem.operand_dtype) for f in (variant.filter_e, variant.filter_c))
    for rows in call.rows():
        s, f = rows.softmax, factors.at(rows.place)
        weight = f.alpha.value[:, None].expand_as(s.p.value)
        if f.entropy is not None:
            weight = weight - f.entropy.value[:, None] * (s.log_p.value + s.entropy.value[:, None])
        weight = weight * scale if s.slope is None else weight * s.slope.value * scale
        weight = weight.scatter(1, rows.targets[:, None], 0.0)  # the target's entry is never filtered
        variance, largest = _moments(s.p, weight, variant.filter_e, eps_e)
        variance_e[rows.index] = torch.stack([variance @ x.square() for x in met]).amax(0)
        farthest = torch.stack([x.abs() for x in met]).amax(0)
        size = torch.stack([(row[:, None] * farthest).amax(0) for row in largest]) if len(largest) else zeros(0, d)
        d_e[rows.index] = _bernstein(variance_e[rows.index], size, log)
        variance, largest = _moments(s.p, weight, variant.filter_c, eps_c)
        variance_c += variance.T @ rows.e.square()
        for row, e in zip(largest, rows.e.abs(), strict=True):
            largest_c = torch.maximum(largest_c, row[:, None] * e)
    undo = torch.argsort(call.ids)
    d_c = _bernstein(variance_c, largest_c, log)
    return Sampling(d_e, d_c[undo], variance_e, variance_c[undo])


def _met(c: Tensor, centred: bool) -> list[Tensor]:
    """The rows (V, D) that P^ meets in dE; of a centred variant with the centre, a mean of rows and 0, at either end of
    its range: their squares are convex in it.
    """
    if not centred:
        return [c]
    return [c - c.amin(0).clamp(max=0), c - c.amax(0).clamp(min=0)]


def _moments(p: Computed, weight: Tensor, filt: Filter, eps: float) -> tuple[Tensor, Tensor]:
    """(B, V) variance of each entry of P^ w, and the largest deviation that it can contribute."""
    small = p.value < eps
    if filt.kind is FilterKind.STOCHASTIC:
        variance, largest = p.value * (eps - p.value), torch.full_like(weight, eps)
    elif filt.kind is FilterKind.SUBSET:
        variance, largest = filt.share * p.value.square(), 2 * (filt.share - 1) * p.value
    else:
        return torch.zeros_like(weight), torch.zeros_like(weight)
    return torch.where(small, variance * weight.square(), 0.0), torch.where(small, largest * weight.abs(), 0.0)


def _bernstein(variance: Tensor, largest: Tensor, log: float) -> Tensor:
    b = largest * (log / 3)
    return b + (b.square() + 2 * log * variance).sqrt()


class Certificate(NamedTuple):
    """What dropping can have done to the gradients of sum_i g_i nll_i, from a kernel's statistics; fp64."""

    rows: Tensor  # (N,) bound of the norm of the error of dE_i
    d_c: Tensor  # () bound of the Frobenius norm of the error of dC


def dropped_mass(kept_mass: Tensor, slack: Tensor | float = 0.0) -> Tensor:
    """(N,) bound of the probability that a filter dropped from each row: what the kept mass K lacks of 1.

    `slack` (N,) bounds the error of K itself, the relative error of the computed probabilities; see
    `Statistics.deviation`.
    """
    return (1 - kept_mass.double()).clamp(min=0) + slack


def certificate(problem: Problem, mass: Tensor, eps: float, upstream: Tensor | None = None) -> Certificate:
    """Bounds of the error that dropping entries below `eps` causes, from the dropped mass (N,) alone.

    dE_i lacks g_i sum_j m_j c_j with 0 <= m_j <= eps and sum_j m_j = M_i: its norm is at most M_i max ||c_j||, at most
    ||C||_2 sqrt(eps M_i), and the same with rows centred on their mean, plus M_i of the mean's norm. dC has no such
    total per row, but its Frobenius norm is at most ||E||_2 sqrt(eps sum_i g_i^2 M_i). `upstream` (N,): g, ones by
    default.

    Spectral norms are bounded by the square root of the largest row sum of the smaller Gram matrix's magnitudes.
    """
    valid = problem.targets >= 0
    mass = torch.where(valid, mass.double(), 0.0)
    g = torch.ones_like(mass) if upstream is None else upstream.double()
    c = problem.c.detach().double()
    e = torch.where(valid[:, None], problem.e.detach().double(), 0.0)
    mean = c.mean(0)
    centred = c - mean

    def norm(rows: Tensor) -> Tensor:
        """(N,) bound of ||sum_j m_j rows_j||."""
        longest = rows.square().sum(1).amax().sqrt()
        return torch.minimum(mass * longest, _spectral(rows) * (eps * mass).sqrt())

    total = torch.minimum(norm(c), norm(centred) + mass * mean.square().sum().sqrt())
    inflate = (1 + 1e-4) / problem.temperature
    return Certificate(
        g.abs() * total * inflate,
        _spectral(e) * (eps * (g.square() * mass).sum()).sqrt() * inflate,
    )


def _spectral(x: Tensor) -> Tensor:
    """() upper bound of the spectral norm: by the infinity norm of the smaller Gram matrix, or the Frobenius norm."""
    gram = x.T @ x if x.shape[1] <= x.shape[0] else x @ x.T
    return torch.minimum(gram.abs().sum(1).amax(), gram.diagonal().sum()).sqrt()
