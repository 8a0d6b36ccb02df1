"""`Enclosure`: fp64 tensors with a rigorous elementwise radius (midpoint-radius arithmetic), on any device.

Every operation returns a value and a radius such that |value - exact| <= radius for every exact operand inside the
radii of its arguments. A rounding costs U = 2^-53 of the result; sums and products of length n cost n U of the sum of
absolute values, in whatever order they are added (Higham, Accuracy and Stability of Numerical Algorithms, section
3.1); exp, expm1, log1p and tanh are taken to be within `ULPS` units in the last place, which a test measures. The
radii are themselves computed in fp64: their own relative error, far below 2^-20, and the terms of second order are
covered once, by `inflated`, at the end.

Assumed: no overflow, classical (not Strassen-like, not emulated) fp64 products. Underflow costs at most TINY and is
counted where it can happen.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["TINY", "U", "ULPS", "Enclosure", "rounding"]

U = 2.0**-53  # unit round-off of fp64
ULPS = 4  # error of exp, expm1, log1p and tanh, in units in the last place (each at most 2 U of the value)
TINY = 2.0**-1022  # below it fp64 underflows


def rounding(value: Tensor, count: int = 1) -> Tensor:
    """Error of `count` roundings that gave `value`."""
    return value.abs() * (count * U)


@dataclass(frozen=True, eq=False)
class Enclosure:
    """The set of fp64 tensors within `radius` of `value`, elementwise; both of one shape."""

    value: Tensor
    radius: Tensor

    @staticmethod
    def exact(value: Tensor) -> Enclosure:
        value = value.double()
        return Enclosure(value, torch.zeros_like(value))

    @staticmethod
    def zeros(shape: tuple[int, ...], device: torch.device) -> Enclosure:
        return Enclosure.exact(torch.zeros(shape, dtype=torch.float64, device=device))

    @property
    def upper(self) -> Tensor:
        """Upper bound of the absolute value."""
        return self.value.abs() + self.radius

    def masked(self) -> Enclosure:
        """The same with infinite values taken as exact: they stand for masked columns."""
        return Enclosure(self.value, self.radius.masked_fill(self.value.isinf(), 0.0))

    def __neg__(self) -> Enclosure:
        return Enclosure(-self.value, self.radius)

    def __add__(self, other: Enclosure | Tensor | float) -> Enclosure:
        if not isinstance(other, Enclosure):
            value = self.value + other
            return Enclosure(value, self.radius + rounding(value))
        value = self.value + other.value
        return Enclosure(value, self.radius + other.radius + rounding(value))

    def __sub__(self, other: Enclosure | Tensor | float) -> Enclosure:
        return self + -other

    def __mul__(self, other: Enclosure | Tensor | float) -> Enclosure:
        if not isinstance(other, Enclosure):
            value = self.value * other
            scale = other.abs() if isinstance(other, Tensor) else abs(other)
            return Enclosure(value, self.radius * scale + rounding(value))
        value = self.value * other.value
        radius = self.value.abs() * other.radius + self.radius * other.upper
        return Enclosure(value, radius + rounding(value))

    def __truediv__(self, other: Enclosure | float) -> Enclosure:
        if not isinstance(other, Enclosure):
            value = self.value / other
            return Enclosure(value, self.radius / abs(other) + rounding(value))
        value = self.value / other.value
        least = (other.value.abs() - other.radius).clamp(min=0)  # a zero divisor gives an infinite or undefined radius
        return Enclosure(value, (self.radius + value.abs() * other.radius) / least + rounding(value))

    def __getitem__(self, index: object) -> Enclosure:
        return Enclosure(self.value[index], self.radius[index])  # type: ignore[index]

    def exp(self) -> Enclosure:
        value = self.value.exp()
        return Enclosure(value, value * (torch.expm1(self.radius) + 2 * ULPS * U) + TINY)

    def expm1(self) -> Enclosure:
        value = self.value.expm1()
        return Enclosure(value, (value + 1) * torch.expm1(self.radius) + rounding(value, 2 * ULPS) + TINY)

    def log1p(self) -> Enclosure:
        """Logarithm of 1 + x for x >= 0."""
        value = self.value.log1p()
        least = (1 + self.value - self.radius).clamp(min=0)
        return Enclosure(value, self.radius / least + rounding(value, 2 * ULPS) + TINY)

    def tanh(self) -> Enclosure:
        value = self.value.tanh()
        return Enclosure(value, self.radius + rounding(value, 2 * ULPS) + TINY)

    def sech2(self) -> Enclosure:
        """The slope 1 - tanh(x)^2 as 4q/(1 + q)^2 with q = exp(-2|x|): relatively accurate however flat tanh is."""
        q = (-2 * self.value.abs()).exp()
        value = 4 * q / (1 + q) ** 2
        relative = torch.expm1(2 * self.radius)  # |d log sech2 / dx| = 2 |tanh x| <= 2
        return Enclosure(value, value * relative + rounding(value, 2 * ULPS + 6) + TINY)

    def sum(self, dim: int) -> Enclosure:
        value = self.value.sum(dim)
        lost = self.value.shape[dim] * U * self.value.abs().sum(dim)
        return Enclosure(value, self.radius.sum(dim) + lost)

    def matmul(self, matrix: Tensor) -> Enclosure:
        """Product with an exact (K, M) matrix."""
        lost = self.radius + rounding(self.value, max(1, self.value.shape[-1]))
        return Enclosure(self.value @ matrix, lost @ matrix.abs())

    def transpose(self) -> Enclosure:
        return Enclosure(self.value.T, self.radius.T)

    def column(self) -> Enclosure:
        """(B,) as (B, 1)."""
        return Enclosure(self.value.unsqueeze(-1), self.radius.unsqueeze(-1))

    def where(self, mask: Tensor, other: Enclosure) -> Enclosure:
        """This where `mask`, `other` elsewhere."""
        return Enclosure(torch.where(mask, self.value, other.value), torch.where(mask, self.radius, other.radius))

    def add_(self, index: object, term: Enclosure) -> None:
        """self[index] += term, in place."""
        total = self.value[index] + term.value  # type: ignore[index]
        self.value[index] = total  # type: ignore[index]
        self.radius[index] += term.radius + rounding(total)  # type: ignore[index]

    def inflated(self) -> Enclosure:
        """The same with a radius that also covers the rounding of the radii; 0 where the value is not finite."""
        radius = self.radius * (1 + 2.0**-20)
        return Enclosure(self.value, radius.masked_fill(~self.value.isfinite(), 0.0))
