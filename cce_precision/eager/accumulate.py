"""Sums of tile contributions to one gradient, with the roundings that `Accumulation` names."""

from __future__ import annotations

import torch
from torch import Tensor

from ..numerics import Accumulation

__all__ = ["Accumulator"]


class Accumulator:
    """A gradient (rows, D) under summation. Contributions arrive in the compute dtype and unscaled; `scale` is applied
    to each before a low-precision addition, or once to an fp32 sum, so that no intermediate of the output's dtype
    under- or overflows unless the result does.
    """

    def __init__(self, shape: tuple[int, int], mode: Accumulation, dtype: torch.dtype, scale: Tensor) -> None:
        self.mode, self.dtype, self.scale = mode, dtype, scale
        sum_dtype = scale.dtype if mode is Accumulation.FP32 else dtype
        self.sum = torch.zeros(shape, dtype=sum_dtype, device=scale.device)
        self.compensation = torch.zeros_like(self.sum) if mode is Accumulation.KAHAN else None

    def add(self, rows: slice | Tensor, value: Tensor) -> None:
        """Adds `value` to distinct rows."""
        if self.mode is Accumulation.FP32:
            if isinstance(rows, slice):
                self.sum[rows] += value
            else:
                self.sum.index_add_(0, rows, value)
            return
        value = value * self.scale
        old = self.sum[rows].to(value.dtype)
        if self.compensation is None:
            self.sum[rows] = (old + value).to(self.dtype)
            return
        value -= self.compensation[rows].to(value.dtype)
        new = (old + value).to(self.dtype)
        self.compensation[rows] = (new.to(value.dtype) - old).sub_(value).to(self.dtype)
        self.sum[rows] = new

    def add_repeated(self, rows: Tensor, value: Tensor) -> None:
        """Adds `value` to rows that may repeat, in fp32 and in order: fp32 sums only."""
        assert self.mode is Accumulation.FP32
        self.sum.index_add_(0, rows, value)

    def result(self, partial: bool = False) -> Tensor:
        """The gradient, rounded once to its dtype where the sum is fp32; in the compute dtype where it is one part of a
        sum."""
        dtype = self.scale.dtype if partial else self.dtype
        if self.mode is Accumulation.FP32:
            return self.sum.mul_(self.scale).to(dtype)
        return self.sum.to(dtype)
