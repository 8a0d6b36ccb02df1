"""Bounds of the tiled backward pass: dE, dC and dbias.

Whatever a filter decides for certain is known, so its effect enters with its sign, as the exact gradient of a changed
softmax; all else enters as magnitudes. Rows come in the blocks of the pass where tiles matter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from cce_precision.analysis.bounds_logits import precision
from cce_precision.analysis.bounds_model import CPU, Computed, Machine, Precision, half_ulp, largest
from cce_precision.analysis.bounds_softmax import NEGLIGIBLE, Softmax
from cce_precision.analysis.bounds_sums import Contribution, Sum, filtered, new_sum
from cce_precision.analysis.budget_stages import ALL_STAGES, Stage, Stages, stage_dtype, with_exact_stages
from cce_precision.numerics import Accumulation, Filter, Operand, Variant
from cce_precision.problem import Plan, Problem, flushed_below, is_centred, is_witness

__all__ = ["Factors", "GradientBounds", "Rows", "tiled_gradients"]


@dataclass(frozen=True, eq=False)
class Factors:
    """Upstream gradients of the heads of all valid tokens, (M,) each, and what the tiled pass makes of them."""

    nll: Computed  # beta
    lse: Computed | None
    entropy: Computed | None  # kappa
    smooth: Computed | None  # sigma
    alpha: Computed
    rest: Computed  # alpha - beta

    @staticmethod
    def of(
        nll: Computed,
        lse: Computed | None,
        entropy: Computed | None,
        smooth: Computed | None,
        total: Computed,
        p: Precision,
    ) -> Factors:
        """`total`: the sum of the column weights."""
        parts = [] if lse is None else [lse]
        if smooth is not None:
            parts.append((total * smooth).rounded(p))
        if not parts:
            return Factors(nll, lse, entropy, smooth, nll, Computed.exact(torch.zeros_like(nll.value)))
        rest = parts[0] if len(parts) == 1 else parts[0] + parts[1]
        alpha = (nll + rest).rounded(p, 2)
        own = Computed(rest.value, rest.error + alpha.error - (nll.error + rest.error))  # beta's own error cancels
        return Factors(nll, lse, entropy, smooth, alpha, own.rounded(p))

    def late_scale(self) -> float:
        """The power of two S that dZ is divided by, or a larger one: matters for underflow alone."""
        upper = [f.upper for f in (self.alpha, self.nll, self.entropy, self.smooth) if f is not None]
        largest = torch.stack(upper).amax() if self.nll.value.numel() else torch.zeros(())
        if not (largest.isfinite() and largest > 0):
            return 1.0
        return float(2.0 ** (torch.frexp(largest)[1].clamp(-120, 120) - 1))

    def at(self, place: slice) -> Factors:
        """The factors of some rows."""
        return self._each(lambda f: f[place])

    def divided(self, scale: float) -> Factors:
        return self._each(lambda f: Computed(f.value / scale, f.error / scale))

    def _each(self, change: Callable[[Computed], Computed]) -> Factors:
        maybe = lambda f: None if f is None else change(f)  # noqa: E731
        return Factors(
            change(self.nll),
            maybe(self.lse),
            maybe(self.entropy),
            maybe(self.smooth),
            change(self.alpha),
            change(self.rest),
        )


@dataclass(frozen=True, eq=False)
class Rows:
    """One block of valid tokens."""

    place: slice  # among the valid tokens
    index: Tensor  # (B,) among all tokens
    e: Tensor  # (B, D) fp64
    targets: Tensor  # (B,) in visiting order
    softmax: Softmax  # columns in visiting order


@dataclass(frozen=True, eq=False)
class GradientBounds:
    d_e: Tensor  # (M, D), of the valid tokens
    d_c: Tensor  # (V, D), in visiting order
    d_bias: Tensor  # (V,)


@dataclass(frozen=True, eq=False)
class _Dz:
    """dZ (B, V) of a filter: the exact one of the filtered softmax, its error, and what the filter changed."""

    x: Computed  # unrounded
    y: Computed  # as the second products see it
    change: Tensor | None  # x of the filtered softmax minus x of the whole one; None without a filter
    unsure: Tensor | None  # error of `change`
    executed: Tensor | None  # (tiles,) which column runs are computed at all; None: all


class _Tiled:
    """What all blocks of one tiled backward pass share. Columns are in visiting order throughout."""

    def __init__(
        self,
        problem: Problem,
        variant: Variant,
        machine: Machine,
        factors: Factors,
        c: Tensor,  # (V, D) fp64
        weight: Tensor,  # (V,) fp64
        ids: Tensor,  # (V,) vocabulary ids
        width: int,
        seed: Tensor,
        stages: Stages,
    ) -> None:
        self.problem, self.machine, self.stages = problem, machine, stages
        self.c, self.ids, self.width = c, ids, width
        self.variant = with_exact_stages(variant, stages)
        self.p = precision(problem, machine, Stage.DZ, stages)
        self.seed, self.weight = seed, Computed.exact(weight)
        self.S = factors.late_scale()
        self.factors = factors.divided(self.S)
        self.runs = [slice(j, min(j + width, len(c))) for j in range(0, len(c), width)]
        self.smooth_apart = factors.smooth is not None and problem.softcap is None
        self.smooth_inside = factors.smooth is not None and problem.softcap is not None
        self.absolute_c = c.abs()
        self.centre: Computed | None = None  # (2, D) of even and odd tokens

    def sum_of(self, mode: Accumulation, shape: tuple[int, ...], dtype: torch.dtype) -> Sum:
        scaled = self.problem.temperature != 1.0
        at = lambda stage: precision(self.problem, self.machine, stage, self.stages)  # noqa: E731
        last = Stage.OUTPUT if mode is Accumulation.FP32 else Stage.SUM
        return new_sum(
            mode, shape, self.c, p=at(Stage.SUM), products=at(Stage.PRODUCT), scaling=at(last), machine=self.machine,
            operand=stage_dtype(self.stages, Stage.PRODUCT, self.problem.operand_dtype),
            dtype=stage_dtype(self.stages, last, dtype),
            scale=self.S / self.problem.temperature, scalings=4 if scaled else 0,
        )  # type: ignore[arg-type]  # fmt: skip

    def find_centre(self, blocks: Iterable[Rows]) -> None:
        """The mean row of what is kept for odd and even tokens, summed in any order. An entry that may be kept or not
        moves it by at most its row, and the centre itself, over their number.
        """
        kept, open_ = (torch.zeros(2, len(self.c), dtype=torch.float64, device=self.c.device) for _ in range(2))
        for rows in blocks:
            some = is_witness(rows.index, self.problem.n)
            x, parity = self.dz(rows, self.variant.filter_e, True).x, rows.index[some] % 2
            certain, possible = x.value.abs() > x.error, x.upper > 0
            if least := self.variant.filter_e.kept_from(self.problem.operand_dtype):
                p = rows.softmax.p
                certain = certain & (p.value - p.error >= least * (1 + 2 * self.p.u))
                possible = possible & (p.upper >= least * (1 - 2 * self.p.u))
            kept.index_add_(0, parity, certain[some].double())
            open_.index_add_(0, parity, (possible & ~certain)[some].double())
        number, count, u = kept.sum(1, keepdim=True).clamp(min=1), kept + open_, (2 * len(self.c) + 8) * self.p.u
        value = kept @ self.c / number
        moved = (open_ @ self.absolute_c + open_.sum(1, keepdim=True) * value.abs()) / number
        error = moved + u * (1 + u) * (count @ self.absolute_c) / number
        self.centre = Computed(value.flip(0), error.flip(0))

    def target_term(self, rows: Rows, f: Factors) -> Computed:
        """(B,) the target's entry of dZ before the slope."""
        p, s = self.p, rows.softmax
        p_t = (-s.nll).exp(p)
        x = (f.rest * p_t).rounded(p) - (f.nll * s.complement).rounded(p)
        if f.entropy is not None:
            spread = (s.entropy - Computed(s.nll.value.clamp(max=-NEGLIGIBLE), s.nll.error)).rounded(p)
            x = x.rounded(p) - (f.entropy * p_t * spread).rounded(p, 2)
        return x.rounded(p)

    def target_slope(self, rows: Rows) -> Computed | None:
        """(B,) the softcap's slope at the target's logit, formed from lse - nll."""
        softcap, p, s = self.problem.softcap, self.p, rows.softmax
        if softcap is None:
            return None
        assert s.slope is not None
        factor = self.problem.temperature / softcap
        z_t = (s.lse - s.nll).rounded(p)
        t = Computed(z_t.value * factor, z_t.error * factor).rounded(p, 5)
        value = s.slope.value.gather(1, rows.targets[:, None])[:, 0]
        error = t.error * (2 * t.value.abs() + t.error) + 3 * p.u * (t.upper**2 + value)
        return Computed(value, error)

    def dz(self, rows: Rows, filt: Filter, over_columns: bool) -> _Dz:
        p, s, f = self.p, rows.softmax, self.factors.at(rows.place)
        is_target = torch.zeros_like(s.p.value, dtype=torch.bool).scatter_(1, rows.targets[:, None], True)
        nothing = Computed.exact(torch.zeros_like(s.p.value))
        whole = self._flushed(nothing.where(is_target, s.p), s)
        label = None if self.variant.label_apart else self.target_term(rows, f)
        p_hat, executed, survives = whole, None, None
        if filt.by_tile:
            survives, executed = self._surviving(rows, whole, filt.threshold(self.problem.operand_dtype))
        elif filt:
            eps = filt.threshold(self.problem.operand_dtype)
            p_hat = filtered(whole, filt, eps, p, self.seed, rows.index, self.ids, over_columns)
        x = self._from_probabilities(p_hat, s, f)
        if label is not None:
            x = label.column().where(is_target, x)
        full = self._from_probabilities(whole, s, f) if filt and not filt.by_tile else x
        if survives is not None:
            x = Computed(x.value * (survives > 0), torch.where(survives == 1, x.upper, x.error * (survives > 0)))
        if self.smooth_inside:
            assert f.smooth is not None
            part = (f.smooth.column() * self.weight).rounded(p)
            x, full = (x - part).rounded(p), (full - part).rounded(p)
        if s.slope is not None:
            x, full = (x * s.slope).rounded(p), (full * s.slope).rounded(p)
        change = unsure = None
        if filt:
            change = x.value - full.value
            # the error in fp64 against that of what is computed: of P, and of the factors, lse and entropy among them
            own = 1.0 if self.problem.compute_dtype is torch.float64 else 2.0**-20
            unsure = own * (x.error + full.error) + 2.0**-50 * (x.value.abs() + full.value.abs())
            unsure = torch.where(change != 0, unsure, 0.0)
        return _Dz(x, self._operand(x, whole, filt), change, unsure, None if self.smooth_inside else executed)

    def _flushed(self, p: Computed, s: Softmax) -> Computed:
        """P (B, V), off by all of an entry that the kernels may write as 0, by P or by P times the softcap's slope."""
        below = flushed_below(self.problem, Plan(self.variant))
        if below == 0 or self.machine.kernels is None:
            return p
        least = p.value - p.error if s.slope is None else (p.value - p.error) * (s.slope.value - s.slope.error)
        small = least < (1 + 2.0**-10) * below * s.complement.upper[:, None]
        return Computed(p.value, torch.where(small, torch.maximum(p.error, p.value), p.error))

    def _from_probabilities(self, p_hat: Computed, s: Softmax, f: Factors) -> Computed:
        p = self.p
        x = (p_hat * f.alpha.column()).rounded(p)
        if f.entropy is None:
            return x
        clamped = Computed(s.log_p.value.clamp(min=NEGLIGIBLE), s.log_p.error)
        spread = (clamped + s.entropy.column()).rounded(p)
        return (x - (p_hat * f.entropy.column() * spread).rounded(p, 2)).rounded(p)

    def _surviving(self, rows: Rows, p_hat: Computed, eps: float) -> tuple[Tensor, Tensor]:
        """(1, V) 2 where the tile survives for certain, 1 where it may, 0 where it does not; (tiles,) where it may."""
        u, f = self.p.u, self.factors
        upper, lower = p_hat.upper.amax(0), (p_hat.value - p_hat.error).amax(0)
        at_target = [rows.softmax.complement]
        if not (f.lse is None and f.entropy is None and f.smooth is None):  # then P_t itself counts too
            at_target.append((-rows.softmax.nll).exp(self.p))
        for entry in at_target:
            upper = upper.scatter_reduce(0, rows.targets, entry.upper, "amax")
            lower = lower.scatter_reduce(0, rows.targets, entry.value - entry.error, "amax")
        states = []
        for run in self.runs:
            certain = bool(lower[run].amax() >= eps * (1 + 2 * u))
            states.append(2 if certain else 0 if bool(upper[run].amax() < eps * (1 - 2 * u)) else 1)
        state = torch.tensor(states, device=upper.device)
        return state.repeat_interleave(self.width)[: p_hat.value.shape[1]][None, :], state > 0

    def _operand(self, x: Computed, whole: Computed, filt: Filter) -> Computed:
        kind, dtype = self.variant.operand, self.problem.operand_dtype
        if dtype == self.p.dtype:
            return x
        rounded = half_ulp(x.upper, dtype)
        pair = half_ulp(rounded, dtype)
        full = torch.zeros_like(pair) if self.machine.name == CPU.name else pair  # the kernels' fp32 operand is a pair
        if kind is Operand.FP32_ABOVE and filt:
            above = whole.value - whole.error >= filt.threshold(dtype) * (1 + 2 * self.p.u)
            lost = torch.where(above, full, rounded)
        else:
            lost = {Operand.FP32: full, Operand.SPLIT: pair}.get(kind, rounded)
        return Computed(x.value, x.error + lost)


def _product(left: Computed, right: Tensor, absolute_right: Tensor, extra: Tensor | None = None) -> Contribution:
    """left (B, K) times an exact right (K, D)."""
    error = left.error if extra is None else left.error + extra
    size = left.upper
    most = largest(size, right)
    return Contribution(left.value @ right, error @ absolute_right, size @ absolute_right, right.shape[0], most)


def _transposed(x: Computed) -> Computed:
    return Computed(x.value.T, x.error.T)


def tiled_gradients(
    problem: Problem,
    variant: Variant,
    machine: Machine,
    factors: Factors,
    blocks: Callable[[], Iterable[Rows]],
    c: Tensor,
    weight: Tensor,
    ids: Tensor,
    width: int,
    seed: Tensor,
    stages: Stages = ALL_STAGES,
) -> GradientBounds:
    """Bounds for `eager/backward.py`; arguments as of `_Tiled`. `blocks` are those of the pass where tiles matter."""
    t = _Tiled(problem, variant, machine, factors, c, weight, ids, width, seed, stages)
    variant, (v, d) = t.variant, c.shape
    if is_centred(problem, Plan(variant)):
        t.find_centre(blocks())
    shared = variant.filter_e == variant.filter_c and not variant.filter_e.random
    sum_c = t.sum_of(variant.accum_c, (v, d), problem.c.dtype)
    change_c, unsure_c = torch.zeros_like(c), torch.zeros_like(c)
    bias = _BiasSum(t, v)
    weighted_c = _weighted(t, t.weight.value, c, v) if t.smooth_apart else None
    rows_e: list[Tensor] = []
    weighted_e = torch.zeros(2, d, dtype=torch.float64, device=c.device)  # sum_i sigma_i e_i: value, absolute
    sigma_error = torch.zeros(d, dtype=torch.float64, device=c.device)
    label_terms = torch.bincount(torch.cat([r.targets for r in blocks()] or [ids[:0]]), minlength=v)

    for rows in blocks():
        dz_e = t.dz(rows, variant.filter_e, True)
        dz_c = dz_e if shared else t.dz(rows, variant.filter_c, False)
        e, absolute_e = rows.e, rows.e.abs()
        rows_e.append(_embedding_bound(t, rows, dz_e, weighted_c))
        where = None if dz_c.executed is None else dz_c.executed.repeat_interleave(t.width)[:v, None]
        sum_c.add(_product(_transposed(dz_c.y), e, absolute_e), where)
        bias.add(dz_c.x)
        if dz_c.change is not None and dz_c.unsure is not None:
            change_c += dz_c.change.T @ e
            unsure_c += dz_c.unsure.T @ absolute_e
            bias.change += dz_c.change.sum(0)
            bias.unsure += dz_c.unsure.sum(0)
        if variant.label_apart:
            x = _label(t, rows)
            to = lambda row, of: torch.zeros_like(c).index_add_(0, rows.targets, row[:, None] * of)  # noqa: E731,B023
            error = to(x.error + t.p.u * x.upper, absolute_e)
            sum_c.add(Contribution(to(x.value, e), error, to(x.upper, absolute_e), 0, product=False))
            bias.add_label(x, rows.targets)
        if t.smooth_apart:
            sigma = t.factors.smooth
            assert sigma is not None
            part = sigma[rows.place]
            weighted_e += torch.stack([part.value @ e, part.upper @ absolute_e])
            sigma_error += part.error @ absolute_e
    if variant.label_apart:
        zero = torch.zeros_like(c)
        sum_c.add(Contribution(zero, zero, zero, label_terms[:, None].double(), product=False))
    if t.smooth_apart:
        _smooth_parts(t, sum_c, bias, weighted_e, sigma_error)
    scale = t.S / problem.temperature
    d_e = torch.cat(rows_e) if rows_e else torch.zeros(0, d, dtype=torch.float64, device=c.device)
    return GradientBounds(
        d_e,
        sum_c.result() + (change_c.abs() + unsure_c) * scale,
        bias.result(label_terms),
    )


def _label(t: _Tiled, rows: Rows) -> Computed:
    """(B,) the target's term, slope included."""
    x = t.target_term(rows, t.factors.at(rows.place))
    slope = t.target_slope(rows)
    return x if slope is None else (x * slope).rounded(t.p)


def _weighted(t: _Tiled, left: Tensor, right: Tensor, terms: int) -> Computed:
    """left (K,) times right (K, D) in the compute dtype, in any order."""
    value, absolute = left @ right, left.abs() @ right.abs()
    error = t.machine.products(t.p, terms, absolute, value.abs(), t.p.dtype, exact=False)
    blocks = len(t.runs)
    return Computed(value, error + blocks * t.p.u * absolute)


def _embedding_bound(t: _Tiled, rows: Rows, dz: _Dz, weighted_c: Computed | None) -> Tensor:
    """(B, D) bound of these rows of dE."""
    p, variant, f = t.p, t.variant, t.factors.at(rows.place)
    total = t.sum_of(variant.accum_e, rows.e.shape, t.problem.e.dtype)
    if variant.accum_e is not Accumulation.FP32:
        for j, run in enumerate(t.runs):
            if dz.executed is None or bool(dz.executed[j]):
                y = Computed(dz.y.value[:, run], dz.y.error[:, run])
                total.add(_product(y, t.c[run], t.absolute_c[run]))
    else:
        total.add(_product(dz.y, t.c, t.absolute_c))
    if variant.label_apart or t.smooth_apart:
        zero = torch.zeros_like(rows.e)
        part = Computed(zero, zero)
        if variant.label_apart:
            part = (_label(t, rows).column() * Computed.exact(t.c[rows.targets])).rounded(p)
        if t.smooth_apart and weighted_c is not None and f.smooth is not None:
            product = (f.smooth.column() * Computed(weighted_c.value[None, :], weighted_c.error[None, :])).rounded(p)
            part = (part - product).rounded(p)
        total.add(Contribution(part.value, part.error, part.upper, 1, product=False))
    if t.centre is not None:
        part = _centre_part(t, rows, dz)
        total.add(Contribution(part.value, part.error, part.upper, 1, product=False))
    bound = total.result()
    if dz.change is not None and dz.unsure is not None:
        change, unsure = dz.change @ t.c, dz.unsure @ t.absolute_c
        if t.centre is not None:
            centre = t.centre.value[rows.index % 2]
            change = change - dz.change.sum(1, keepdim=True) * centre
            unsure = unsure + dz.unsure.sum(1, keepdim=True) * centre.abs()
        bound = bound + (change.abs() + unsure) * (t.S / t.problem.temperature)
    return bound


def _centre_part(t: _Tiled, rows: Rows, dz: _Dz) -> Computed:
    """(B, D) what dE loses for the centre: what the rows of dZ under its filter, the label's term among them, sum to
    beyond alpha - beta, in any order, times the centre.
    """
    assert t.centre is not None
    label, rest, v = _label(t, rows), t.factors.rest[rows.place], dz.y.value.shape[1]
    size = dz.y.upper.sum(1) + label.upper + rest.upper
    error = dz.y.error.sum(1) + label.error + rest.error + (v + 3) * t.p.u * (1 + (v + 3) * t.p.u) * size
    excess = Computed(dz.y.value.sum(1) + label.value - rest.value, error)
    parity = rows.index % 2
    part = (excess.column() * Computed(t.centre.value[parity], t.centre.error[parity])).rounded(t.p)
    return Computed(-part.value, part.error)


class _BiasSum:
    """Column sums of dZ before the operand's rounding."""

    def __init__(self, t: _Tiled, v: int) -> None:
        self.t = t
        zeros = lambda: torch.zeros(v, dtype=torch.float64, device=t.c.device)  # noqa: E731
        self.value, self.error, self.absolute, self.change, self.unsure = zeros(), zeros(), zeros(), zeros(), zeros()
        self.depth, self.blocks = 0, 0

    def add(self, x: Computed) -> None:
        self.value += x.value.sum(0)
        self.error += x.error.sum(0)
        self.absolute += x.upper.sum(0)
        self.depth = max(self.depth, self.t.machine.sum_depth(x.value.shape[0], inner=False))
        self.blocks += 1

    def add_label(self, x: Computed, targets: Tensor) -> None:
        for total, part in ((self.value, x.value), (self.error, x.error), (self.absolute, x.upper)):
            total.index_add_(0, targets, part)

    def result(self, label_terms: Tensor) -> Tensor:
        t, p = self.t, self.t.p
        dtype = p.dtype if t.problem.bias is None else t.problem.bias.dtype
        additions = (self.depth + self.blocks + 2 + label_terms).double()
        lost = additions * p.u * (1 + additions * p.u) * self.absolute
        scale = t.S / t.problem.temperature
        total = Computed(self.value * scale, (self.error + lost) * scale)
        total = total.rounded(p, 4 if t.problem.temperature != 1.0 else 0)
        bound = total.error if dtype == p.dtype else total.stored(dtype).error
        return bound + (self.change.abs() + self.unsure) * scale


def _smooth_parts(t: _Tiled, sum_c: Sum, bias: _BiasSum, weighted_e: Tensor, sigma_error: Tensor) -> None:
    """The rank-one part -sigma w^T, added to dC and dbias apart."""
    p, sigma = t.p, t.factors.smooth
    assert sigma is not None
    n = len(sigma.value)
    value, absolute = weighted_e
    blocks = -(-n // 1024)
    error = (
        sigma_error + t.machine.products(p, n, absolute, value.abs(), p.dtype, exact=False) + blocks * p.u * absolute
    )
    outer = (t.weight.column() * Computed(value[None, :], error[None, :])).rounded(p)
    sum_c.add(Contribution(-outer.value, outer.error, outer.upper, 1, product=False))
    total = sigma.sum(0, p, t.machine.sum_depth(n))
    part = (t.weight * total).rounded(p)
    bias.value -= part.value
    bias.error += part.error
    bias.absolute += part.upper
