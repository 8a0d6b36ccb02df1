"""Bounds of the heads and the softmax of Triton's kernels: heads.py and hopper.py forward, dz.py backward, in base 2.

With capped logits w, T the temperature and y = w / T, a row of the forward pass is (machine numbers have hats):

    p_j = exp2(fma(w^_j, s, -r)), r = fl(s m)    s = fl(log2(e) / T), m the largest logit so far but for the target's
    sum <- exp2(fl(fl(m - m') s)) sum + sum of the tile's p_j     tile after tile, then split after split
    gap = ln2 (log2(sum) - fma(w^_t, s, -r)), nll = max(gap, 0) + log1p(exp2(-|gap| log2(e)))
    lse = m / T + ln2 (log2(sum) - fma(s, m, -r)) + the same log1p, or w_t / T + log1p where gap <= 0

What errs, in natural units, u the unit round-off, e the error of exp2 (Kernels.exp2 ulp, each 2u at most):

* s is log2(e) / T times 1 + x with x known: the row is that of logits (1 + x) y. d lse / dx is a mean of the y_j.
* r is common to a row, and what its rounding lost is added again at the end. Only tiles before the one with the row's
  maximum had another reference: each |running maximum| there is at most max(|m|, |y_j|) for every j of the tile, as
  the running maximum is at least y_j. So it costs sum q_j (half an ulp of max(|m|, |y_j|) + half an ulp of m).
* A term's exponent is rounded once, after the fused product: half an ulp of its distance d_j = m - y_j. The arguments
  of the factors with which it is rescaled are rounded twice each, and add up to at most d_j. Rescalings of one maximum
  into itself are exact; each other one costs e, a product and an addition; at most tiles - 1 of them.
* log1p is the quotient form: the logarithm, a division, a product, and u / 2 for where the logarithm is taken.
* A nll of at most the rounding of its exponent gets no rounding of max(gap, 0) + tail where gap <= 0.

The backward pass: P = exp2(fl(fma(w^_j, fl(1 / T), -lse) log2(e))), of the same w^_j: their errors move P as they move
a softmax, and the lse's own arithmetic comes on top.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from cce_precision.analysis.bounds_logits import precision, products
from cce_precision.analysis.bounds_model import LARGEST_EXPONENT, Computed, Kernels, Machine, Precision, half_ulp
from cce_precision.analysis.bounds_softmax import NEGLIGIBLE, Exact, Softmax, certain, complement_of, slope_of
from cce_precision.analysis.budget_stages import ALL_STAGES, Stage, Stages
from cce_precision.problem import Problem

__all__ = ["kernel_softmax"]

LN2, LOG2E = math.log(2), math.log2(math.e)
NOTHING_LEFT = 1e4  # stands for an infinite gap between the target's logit and the others


def _off(exact: float, dtype: torch.dtype) -> float:
    """Relative error of rounding a constant to `dtype`."""
    return abs(float(torch.tensor(exact, dtype=dtype).double()) / exact - 1) + 2.0**-53


class Arithmetic:
    """What the kernels' operations lose, for quantities in natural units that they hold in base 2."""

    def __init__(self, kernels: Kernels, p: Precision, temperature: float) -> None:
        self.kernels, self.p, self.u, self.tiny = kernels, p, p.u, p.tiny
        ulp = 2 * p.u
        self.exp2, self.log = kernels.exp2 * ulp, kernels.log * ulp
        self.log2e, self.ln2 = _off(LOG2E, p.dtype), _off(LN2, p.dtype)
        self.scale = _off(LOG2E / temperature, p.dtype)
        self.inverse = 0.0 if temperature == 1.0 else _off(temperature, p.dtype) + kernels.divide * ulp
        self.least = 0.0 if temperature == 1.0 else p.tiny  # of a subnormal quotient

    def over(self, x: Tensor) -> Tensor:
        """A division of x, of the magnitude of its quotient, by the temperature."""
        return self.inverse * x.abs() + self.least

    def half(self, x: Tensor) -> Tensor:
        """Rounding of a number of natural magnitude x."""
        return half_ulp(x.abs(), self.p.dtype)

    def half2(self, x: Tensor) -> Tensor:
        """Rounding of x log2(e), in natural units."""
        return half_ulp(x.abs() * LOG2E * (1 + 4 * self.u), self.p.dtype) * LN2

    def product2(self, x: Tensor) -> Tensor | float:
        """Rounding of the product s w before it is added to; nothing where they are one operation."""
        return 0.0 if self.kernels.fused else self.half2(x)


def _tanh(x: Tensor, argument: Tensor, a: Arithmetic) -> Computed:
    """primitives.tanh at an argument that is off by `argument`.

    Below 1/2, y + y (y^2 series): the polynomial is off by 1.5e-8 < u / 2, its second term is at most 0.084 and has
    seven roundings, the last is that of the sum: 2u. Above, 1 - 2 q / (1 + q): the exponent's two roundings and that of
    log2(e) move q by 2 |x| (2u + its error), then exp2, 1 + q, the reciprocal, a product, all in proportion to
    1 - |tanh|, and the difference.
    """
    t = torch.tanh(x)
    slope = 1 / torch.cosh(x.clamp(-350, 350)) ** 2
    steepest = (slope + 0.77 * argument).clamp(max=1.0)  # |tanh''| <= 4 / (3 sqrt 3)
    least = (x.abs() - argument).clamp(min=0)
    q = 2 / (1 + torch.exp(2 * least))  # 1 - tanh(least)
    exponent = 2 * (x.abs() + argument) * (2 * a.u + a.log2e)
    large = q * (exponent + a.exp2 + (2 + 2 * a.kernels.reciprocal) * a.u) * (1 + 1e-5)
    large = torch.where(x.isinf(), 0.0, large) + a.u + a.tiny  # q is 0 there, the exponent infinite
    small = 2 * a.u * (t.abs() + argument) + a.tiny
    own = torch.where(x.abs() + argument < 0.5, small, torch.where(least > 0.5, large, torch.maximum(small, large)))
    return Computed(t, (steepest * argument).clamp(max=2.0) + own)


def _logits(
    problem: Problem, e: Tensor, c: Tensor, bias: Tensor | None, machine: Machine, a: Arithmetic, stages: Stages
) -> tuple[Computed, Computed | None, Computed | None]:
    """Capped logits (B, V) before the temperature, slope and tanh."""
    p = a.p
    w = products(problem, e, c, machine, stages, in_order=a.kernels.chain)
    if bias is not None:
        w = certain(Computed(w.value + bias, w.error).stored(p.dtype))
    if problem.softcap is None:
        return w, None, None
    softcap = problem.softcap
    own = _off(softcap, p.dtype)
    off = own + a.kernels.divide * 2 * p.u + p.u  # of 1 / softcap, and the product with it
    x = w.value / softcap
    argument = torch.where(x.isinf(), 0.0, w.error / softcap + off * (1 + 8 * p.u) * (x.abs() + w.error / softcap))
    tanh = _tanh(x, argument, a)
    slope = slope_of(x, tanh, p)
    error = tanh.error * softcap
    capped = Computed(tanh.value * softcap, error + (own + p.u) * (tanh.value.abs() * softcap + error) + p.tiny)
    return capped, slope, tanh


@dataclass(frozen=True)
class _Sum:
    """sum_j w_j exp(y_j - top) as the walk over the tiles forms it: (B,) its relative error; (B, V) of its terms."""

    error: Tensor
    distance: Tensor  # top - y_j, or more
    exponents: Tensor  # what errs in the exponents, in natural units

    @staticmethod
    def of(x: Exact, weights: Tensor, top: Tensor, a: Arithmetic, tiles: int, depth: int) -> _Sum:
        here = weights > 0
        slack = 2 * x.delta.amax(1) + a.half2(top)
        distance = torch.where(here, top[:, None] - x.z, 0.0) + slack[:, None]
        exponents = a.half2(distance) + torch.where(here, a.product2(x.z), 0.0)
        if tiles > 1:
            reference = torch.where(here, torch.maximum(x.z.abs(), top.abs()[:, None]), 0.0)
            exponents = exponents + 2 * a.u * distance + a.half2(reference) + a.half2(top)[:, None]
        steps = depth * a.u + a.exp2 + (tiles - 1) * (a.exp2 + 2 * a.u)
        rho = (weights * exponents).sum(1) + steps + x.z.shape[1] * a.tiny
        return _Sum(rho / (1 - rho).clamp(min=2.0**-20), distance, exponents)


def kernel_softmax(
    problem: Problem,
    e: Tensor,  # (B, D) fp64
    c: Tensor,  # (V, D) fp64
    bias: Tensor | None,  # (V,) fp64
    targets: Tensor,  # (B,)
    weight: Tensor,  # (V,) fp64 column weights
    machine: Machine,
    stages: Stages = ALL_STAGES,
) -> Softmax:
    """The heads of the kernels' forward pass and the softmax of their backward pass."""
    assert machine.kernels is not None
    t, v = problem.temperature, len(c)
    a = Arithmetic(machine.kernels, precision(problem, machine, Stage.SOFTMAX, stages), t)
    own = Arithmetic(machine.kernels, precision(problem, machine, Stage.LOGITS, stages), t)
    w, slope, tanh = _logits(problem, e, c, bias, machine, own, stages)
    x = Exact.of(Computed(w.value / t, w.error / t), targets)
    itemsize = problem.operand_dtype.itemsize
    tiles, depth = a.kernels.tiles(v, itemsize), a.kernels.row_depth(v, itemsize)
    nll, lse, arithmetic = _losses(x, a, tiles, depth)

    log_p = x.log_p.abs()
    # Both passes have the same logits where each is one sum in a known order; under a softcap a compiler may fuse the
    # products of the two tanh differently.
    same = a.kernels.chain and problem.softcap is None
    tau = x.log_p_moved() + arithmetic[:, None] if same else x.raw + lse.error[:, None]
    tau = tau + a.half(log_p + tau) + a.inverse * x.z.abs().nan_to_num(posinf=0.0)
    if not a.kernels.fused:
        tau = tau + torch.where(x.z.isfinite(), a.half(x.z), 0.0)
    exponent = tau + a.half2(log_p + tau) + a.log2e * (log_p + tau)
    probability = _power(x.log_p, exponent, a)
    return Softmax(
        Computed(x.z, x.raw),
        slope,
        tanh,
        Computed(x.log_p, torch.where(x.log_p > NEGLIGIBLE, tau, 0.0)),
        probability,
        probability,
        nll,
        lse,
        complement_of(nll, a.p),
        _entropy(x, a, tiles, depth),
        _smooth(x, a, weight, arithmetic, tiles, tanh is not None),
    )


def _power(log_p: Tensor, off: Tensor, a: Arithmetic) -> Computed:
    """exp2 of an exponent that is off by `off`, in natural units."""
    value, off = log_p.exp(), off.clamp(max=LARGEST_EXPONENT)
    return Computed(value, value * (torch.expm1(off) + a.exp2 * off.exp()) + torch.where(value > 0, a.tiny, 0.0))


def _losses(x: Exact, a: Arithmetic, tiles: int, depth: int) -> tuple[Computed, Computed, Tensor]:
    """nll and lse (B,), and what the lse's own arithmetic loses."""
    some, target = x.rest_sum > 0, x.z_t.isfinite()  # both, unless there is one class, or the target is masked
    both, moved = some & target, Exact.moved(x.q, x.delta)
    delta = torch.maximum(x.delta.amax(1), x.delta_t)
    top = torch.where(some, x.rest_max, 0.0)
    s = _Sum.of(x, x.q, top, a, tiles, depth)
    mean, square = (x.q * s.distance).sum(1) * x.growth, (x.q * s.distance**2).sum(1) * x.growth
    log_s = torch.where(some, torch.log(x.rest_sum.clamp(min=1.0)) + 2 * delta + s.error, 0.0)
    shared = torch.where(some, s.error + a.log * log_s, 0.0)  # of the log-sum-exp over the others

    rest = torch.where(some, x.rest_max + torch.log(x.rest_sum), 0.0)
    gap = torch.where(both, rest - x.z_t, torch.where(some, NOTHING_LEFT, -NOTHING_LEFT))
    to_target = torch.where(both, x.rest_max - x.z_t, 0.0)
    centre = (to_target - mean / x.growth).abs() + (1 - 1 / x.growth) * mean + 4 * delta + 2 * a.half2(top)
    private = a.scale * centre + a.scale**2 * square
    private = private + a.half2(to_target.abs() + 2 * delta + a.half2(top)) + torch.where(both, a.product2(x.z_t), 0.0)
    size = gap.abs() + moved + x.delta_t + shared + private
    private = private + a.half2(size) + a.half(size) + a.ln2 * size
    off_gap = shared + private  # for the computed logits
    moved_gap = off_gap + moved + x.delta_t

    # log1p(exp(-|gap|)): its derivative with respect to |gap| is at most itself
    tail = torch.log1p(torch.exp((moved_gap - gap.abs()).clamp(max=0.0)))
    kahan = a.log + (2 * a.kernels.divide + 1.5) * a.u
    functions = tail * (a.exp2 + kahan + a.half2(size) + a.log2e * size) * (1 + 1e-5) + 2 * a.tiny
    functions = torch.where(both, functions, 0.0)

    grown = lambda share, off: (share * torch.exp(off.clamp(max=LARGEST_EXPONENT))).clamp(max=1.0)  # noqa: E731
    off = grown(x.complement, moved_gap) * moved_gap + functions
    nll = certain(Computed(x.nll, off + torch.where(gap + moved_gap > 0, a.half(x.nll + off), 0.0)))

    others, own = grown(x.complement * x.growth, off_gap), grown((1 - x.complement) * x.growth, off_gap)
    by_rest = others * shared + own * private + a.scale * mean + a.over(top)
    by_rest = by_rest + a.half2(log_s) + a.ln2 * log_s + (0.0 if a.kernels.fused else a.half(log_s))
    by_rest = by_rest + a.half(rest.abs() + moved + shared + by_rest)
    by_target = others * off_gap + a.over(torch.where(target, x.z_t, 0.0))
    either = torch.where(gap < -moved_gap, by_target, torch.maximum(by_rest, by_target))
    arithmetic = torch.where(gap > moved_gap, by_rest, either) + functions
    shifted = Exact.moved(x.p, x.delta)
    arithmetic = arithmetic + torch.where(both, a.half(x.lse.abs() + shifted + arithmetic), 0.0)
    return nll, Computed(x.lse, shifted + arithmetic), arithmetic


def _entropy(x: Exact, a: Arithmetic, tiles: int, depth: int) -> Computed:
    """log(total) + A / total, A = sum exp(y - m) (m - y), the target among them: terms that are not negative, but for
    the rounding of the reference.

    A term of A has its exponent's errors, that of the exponent as a factor, and a product; a tile adds to A the sum
    times the change of the reference, before both are rescaled: two operations more than the sum has.
    """
    m = x.z.amax(1)
    s = _Sum.of(x, x.p, m, a, tiles, depth)
    twice = s.exponents + a.half2(s.distance)  # a second rounding where the target's logit is the largest
    total = s.error + (x.p * a.half2(s.distance)).sum(1) + 2 * a.exp2 + 6 * a.u
    mean = (x.p * s.distance).sum(1)
    part = (x.p * (s.distance + 1) * twice).sum(1)
    part = part + mean * (total + (8 + 3 * (tiles - 1) + 2 * a.kernels.divide) * a.u)
    log_total = x.lse - m + 2 * x.delta.amax(1) + total
    rounding = log_total * (a.log + a.ln2) + a.half2(log_total + mean)
    variance = (x.p * (x.log_p + x.entropy[:, None]) ** 2).sum(1) * x.growth
    error = x.entropy_moved() + (part + total * (1 + mean)) * (1 + total) + rounding + a.scale * variance
    return Computed(x.entropy, error + 2 * a.u * (x.entropy + error))


def _smooth(x: Exact, a: Arithmetic, weight: Tensor, lse_arithmetic: Tensor, tiles: int, capped: bool) -> Computed:
    """Over the splits, W (lse - o / T) - sum_j w_j (capped logit_j - o) / T, o the largest of a split's first tile."""
    v, ones = x.z.shape[1], bool((weight == 1).all())
    delta, finite = x.raw.amax(1), torch.where(x.z.isfinite(), x.z, 0.0)
    high, low = finite.amax(1), finite.amin(1)
    value = (weight * (x.lse[:, None] - x.z)).sum(1)
    offset = high if tiles == 1 else torch.maximum(high.abs(), low.abs())
    spread = high[:, None] - finite
    if tiles > 1:
        spread = torch.maximum(spread, finite - low[:, None])
    spread = (weight.abs() * (spread + 2 * delta[:, None])).sum(1)
    distance = (x.lse - (high if tiles == 1 else low)).abs() + lse_arithmetic + 2 * delta
    steps = min(v, a.kernels.widest) + tiles + 12  # in a tile, from tile to tile; the difference, its product; splits
    error = x.smooth_moved(weight) + (a.u * steps + a.inverse) * spread
    if capped:  # the product with the softcap may be rounded in the target's logit and not here, where it is added to
        error = error + (weight.abs() * a.half(finite)).sum(1)
    lost = lse_arithmetic + a.over(offset) + a.u * (12 if ones else 12 + v) * distance
    error = error + weight.abs().sum() * lost
    return Computed(value, torch.where(value.isfinite(), error + a.u * (value.abs() + error), 0.0))
