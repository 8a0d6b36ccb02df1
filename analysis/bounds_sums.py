"""Bounds of sums of tile contributions, one class for each `Accumulation`, and of what filters make of P."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from cce_precision.analysis.bounds_model import Computed, Machine, Precision, half_ulp
from cce_precision.eager.filters import _one_of_each_share, uniform
from cce_precision.numerics import Accumulation, Filter, FilterKind

__all__ = ["Contribution", "Sum", "filtered", "new_sum"]


@dataclass(frozen=True, eq=False)
class Contribution:
    """One tile's addition to a gradient, in units of the late scale: an exact product and what may be wrong with it."""

    value: Tensor  # of the filtered and otherwise exact dZ
    error: Tensor  # from the errors of dZ's entries
    absolute: Tensor  # sum |dZ| |W|, errors included
    terms: int | Tensor  # products added up
    largest: float = 0.0  # magnitude in dZ plus that in W
    product: bool = True  # whether a matrix product of `terms` terms rounds on top; else `error` is all


@dataclass
class Sum:
    """A gradient under summation; `result` bounds its error against the exact sum of the values."""

    p: Precision  # of additions
    products: Precision  # of the matrix products
    scaling: Precision  # of the multiplication by the scale
    machine: Machine
    operand: torch.dtype  # of the matrix products
    dtype: torch.dtype  # of the gradient
    scale: float  # S / temperature
    scalings: int  # roundings that multiplying by it costs
    value: Tensor
    error: Tensor

    def add(self, c: Contribution, where: Tensor | None = None) -> None:
        raise NotImplementedError

    def result(self) -> Tensor:
        raise NotImplementedError


@dataclass
class SumOnce(Sum):
    """FP32: summed in the compute dtype, scaled, rounded once. Tiles make one sum of all products, in some order."""

    absolute: Tensor = field(init=False)
    terms: int | Tensor = 0
    product_terms: int = 0
    largest: float = 0.0

    def __post_init__(self) -> None:
        self.absolute = torch.zeros_like(self.value)

    def add(self, c: Contribution, where: Tensor | None = None) -> None:
        self.value = self.value + c.value
        self.error = self.error + c.error
        self.absolute = self.absolute + c.absolute
        if c.product:
            assert isinstance(c.terms, int)
            self.product_terms += c.terms
            self.largest = max(self.largest, c.largest)
        else:
            self.terms = self.terms + c.terms

    def result(self) -> Tensor:
        out = self.value.abs() + self.error
        size, terms, largest = self.absolute, self.product_terms, self.largest
        lost = self.machine.products(self.products, terms, size, out, self.operand, exact=False, largest=largest)
        lost = lost + self.terms * self.p.u * (1 + self.terms * self.p.u) * (self.absolute + out) / 2
        total = Computed(self.value, self.error + lost)
        total = Computed(total.value * self.scale, total.error * self.scale).rounded(self.scaling, self.scalings)
        return (total if self.dtype == self.scaling.dtype else total.stored(self.dtype)).error


@dataclass
class SumInput(Sum):
    """INPUT: read, add in the compute dtype, round, write; tile after tile."""

    def _scaled(self, c: Contribution) -> Computed:
        error = c.error
        if c.product:
            assert isinstance(c.terms, int)
            size, out = c.absolute, c.value.abs()
            error = error + self.machine.products(
                self.products, c.terms, size, out, self.operand, exact=False, largest=c.largest
            )
        return Computed(c.value * self.scale, error * self.scale).rounded(self.p, self.scalings)

    def add(self, c: Contribution, where: Tensor | None = None) -> None:
        step = self._scaled(c)
        total = Computed(self.value + step.value, self.error + step.error).rounded(self.p)
        if self.dtype != self.p.dtype:
            total = total.stored(self.dtype)
        self.value = total.value
        self.error = total.error if where is None else torch.where(where, total.error, self.error)

    def result(self) -> Tensor:
        return self.error


@dataclass
class SumKahan(SumInput):
    """KAHAN: s_t = s_{t-1} + (v_t - c_{t-1}) + r_t and c_t = r_t + g_t, with r_t, g_t the roundings of s_t and c_t.

    Telescoping, s_T = sum v_t + r_T - sum_{t<T} g_t + the roundings of v_t - c_{t-1}: only the last r_t remains.
    """

    last: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.last = torch.zeros_like(self.value)

    def add(self, c: Contribution, where: Tensor | None = None) -> None:
        p, step = self.p, self._scaled(c)
        low = (lambda x: half_ulp(x, self.dtype)) if self.dtype != p.dtype else (lambda x: p.u * x + p.tiny)
        addend = step.upper + self.last * (1 + 2 * p.u)
        total = (self.value + step.value).abs() + self.error + step.error + p.u * addend  # the last rounding cancels
        rounding = low(total * (1 + p.u)) + (p.u * total if self.dtype != p.dtype else 0.0)
        missed = p.u * (addend + rounding)  # fl(new - old)
        missed = missed + p.u * (rounding + missed) + low(rounding + missed)
        error = self.error + step.error + p.u * addend + missed + p.tiny
        self.value = self.value + step.value
        self.error = error if where is None else torch.where(where, error, self.error)
        self.last = rounding if where is None else torch.where(where, rounding, self.last)

    def result(self) -> Tensor:
        return self.error + self.last


def new_sum(mode: Accumulation, shape: tuple[int, ...], like: Tensor, **parameters: object) -> Sum:
    kind = {Accumulation.FP32: SumOnce, Accumulation.INPUT: SumInput, Accumulation.KAHAN: SumKahan}[mode]
    zeros = [torch.zeros(shape, dtype=torch.float64, device=like.device) for _ in range(2)]
    return kind(value=zeros[0], error=zeros[1], **parameters)  # type: ignore[arg-type]


def filtered(
    p_hat: Computed,  # (B, V) probabilities in visiting order, 0 at the targets
    filt: Filter,
    eps: float,
    p: Precision,
    seed: Tensor,
    rows: Tensor,  # (B,) token indices
    ids: Tensor,  # (V,) vocabulary ids in visiting order
    over_columns: bool,
) -> Computed:
    """P^ of an element filter: its value for exact P, and how far the computed one may be from it.

    Where the error of P leaves open on which side of eps (or of the drawn threshold) it falls, both sides lie within
    the error.
    """
    value, error = p_hat.value, p_hat.error
    small = p_hat.upper < eps * (1 - 2 * p.u)
    large = value - error >= eps * (1 + 2 * p.u)
    zero = torch.zeros_like(value)
    if filt.kind is FilterKind.DROP:
        kept, kept_error, either = zero, zero, value
    elif filt.kind is FilterKind.STOCHASTIC:
        level = eps * uniform(seed, rows[:, None], ids[None, :], p.dtype).double()
        keep = (value - error >= level * (1 + 3 * p.u)) & (value > 0)
        lose = (p_hat.upper < level * (1 - 3 * p.u)) | (value == 0)
        kept = torch.where(keep, eps, zero)
        kept_error = torch.where(keep, 2 * p.u * eps, zero)
        small, either = small & (keep | lose), value.clamp(min=eps)
    else:
        places = torch.arange(value.shape[1], device=value.device) if over_columns else rows
        chosen = _one_of_each_share(seed, places, filt.share, 1 if over_columns else 2)
        factor = filt.share * (chosen[None, :] if over_columns else chosen[:, None]).double()
        kept, kept_error = factor * value, factor * (error + p.u * (value + error))
        either = value * factor.clamp(min=1.0)
        error = error * factor.clamp(min=1.0)
    decided = Computed(kept, kept_error).where(small, p_hat)
    return decided.where(small | large, Computed(value, either + error * (1 + p.u)))
