"""Running bounds of sums in a known order: from the partial sums that one accumulator goes through.

`Machine.products` bounds a sum in any order, from sum |a b| alone. Where the products of one accumulator come in the
order of the operands, as the logits of one output do, the exact partial sums are known, and with them what each step
can lose:

* Tensor cores (`running`). All terms of a block are cut at one place, `fraction` bits below the largest exponent. A
  number cut at a higher place loses no less, so a place that is no lower than the true one bounds each loss by what
  the exact product has below it. The accumulator, itself off by the errors so far, loses less than a unit of that
  place, and nothing where its own last bit lies above it. Then the sum is cut to fp32: what it has below the last bit
  where nothing was lost before, else less than a unit of its last place; and nothing where that lies below the cut.
* fp32 (`fused`): one multiply-add a step, which loses at most half an ulp of the partial sum.

That is 3 to 80 times less than the bound for every order.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cce_precision.analysis.bounds_model import Machine, half_ulp

__all__ = ["chain", "fused", "running"]

SINGLE = torch.finfo(torch.float32)
LOWEST, LEAST = -126, -133  # exponents of subnormal accumulators, and below which no block is cut
NOTHING = -(10**4)  # exponent of 0


def _exponent(x: Tensor, lowest: int) -> Tensor:
    """floor(log2 |x|), not below `lowest`, the exponent of a format's subnormal numbers; NOTHING of 0."""
    return torch.where(x == 0, NOTHING, (torch.frexp(x)[1] - 1).clamp(min=lowest))


def _below(x: Tensor, place: Tensor) -> Tensor:
    """What |x| has below 2^place."""
    unit = torch.ldexp(torch.ones_like(x), place)
    return torch.remainder(x.abs(), unit)


def running(a: Tensor, b: Tensor, acc: Tensor, machine: Machine) -> Tensor:
    """Bound of the error of acc + sum_k a_k b_k as a chain of blocks.

    Args:
        a, b: (..., K) bf16 or fp16; they broadcast. acc: (...) fp32.
        machine: one with tensor cores.

    Returns (...) fp64. Raises ValueError for a machine that adds in any order, or operands that are not of 16 bits.
    """
    if not machine.block:
        raise ValueError(f"machine {machine.name!r} has no tensor cores: there is no order of its sums to follow")
    if not (a.dtype == b.dtype and a.dtype in (torch.bfloat16, torch.float16)):
        raise ValueError(f"operands must both be bf16 or both fp16, got {a.dtype} and {b.dtype}")
    _, lowest = torch.frexp(torch.tensor(torch.finfo(a.dtype).smallest_normal, dtype=torch.float64))
    left, right, total = a.double(), b.double(), acc.double()
    exponents = [_exponent(x, int(lowest) - 1) for x in (left, right)]
    error = torch.zeros_like(total + (left[..., 0] * right[..., 0] if a.shape[-1] else 0.0))
    total = total.expand_as(error)
    for start in range(0, a.shape[-1], machine.block):
        k = slice(start, start + machine.block)
        product = left[..., k] * right[..., k]
        top = torch.where(product == 0, NOTHING, exponents[0][..., k] + exponents[1][..., k]).amax(-1)
        most, least = total.abs() + error, (total.abs() - error).clamp(min=0)
        cut = torch.maximum(top, _exponent(most, LOWEST)).clamp(min=LEAST) - machine.fraction
        lost = _below(product, cut[..., None]).sum(-1)
        known = torch.where(error == 0, _below(total, cut), torch.ldexp(torch.ones_like(error), cut))
        last = torch.where(least == 0, NOTHING, _exponent(least, LOWEST)) - 23
        lost = lost + torch.where((last >= cut) | (most == 0), 0.0, known)
        exact, error = error == 0, error + lost
        total = total + product.sum(-1)
        place = _exponent(total.abs() + error, LOWEST).clamp(min=LOWEST) - 23
        rounding = torch.where(exact & (lost == 0), _below(total, place), torch.ldexp(torch.ones_like(error), place))
        error = error + torch.where(place <= cut, 0.0, rounding)
    return error


def fused(a: Tensor, b: Tensor) -> Tensor:
    """Bound of the error of sum_k a_k b_k as a chain of fp32 multiply-adds. a, b (..., K) fp64; they broadcast."""
    total = error = torch.zeros_like(a[..., 0] * b[..., 0] if a.shape[-1] else (a * b).sum(-1))
    for k in range(a.shape[-1]):
        total = total + a[..., k] * b[..., k]
        error = error + half_ulp(total.abs() + error, torch.float32)
    return error


def chain(e: Tensor, c: Tensor, machine: Machine, operand: torch.dtype) -> Tensor:
    """(B, V) bound of the error of e c^T, e (B, D) and c (V, D) fp64, whose features come in their order."""
    left, right = e[:, None, :], c[None, :, :]
    if operand is torch.float32:
        return fused(left, right)
    return running(left.to(operand), right.to(operand), torch.zeros((), dtype=torch.float32), machine)
