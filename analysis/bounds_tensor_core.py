"""Running bounds of tensor core sums: from the partial sums that one chain of blocks goes through.

`Machine.products` bounds a sum in any order, from sum |a b| alone. Where the products of one accumulator come in the
order of the operands, as the logits of one output do, each block's error follows from what is aligned in it: `block` +
1 terms, each cut by less than 2^-fraction of the largest, and the sum cut to fp32. That is 3 to 80 times less.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cce_precision.analysis.bounds_model import Machine

__all__ = ["running"]

SINGLE = torch.finfo(torch.float32)


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
    normal = torch.finfo(a.dtype).smallest_normal
    left, right, total = a.double(), b.double(), acc.double()
    # magnitudes as they are aligned: a subnormal factor or accumulator counts as the smallest normal number
    aligned = [torch.where(x == 0, 0.0, x.abs().clamp(min=normal)) for x in (left, right)]
    error = torch.zeros_like(total + (left[..., 0] * right[..., 0] if a.shape[-1] else 0.0))
    for start in range(0, a.shape[-1], machine.block):
        k = slice(start, start + machine.block)
        most = (aligned[0][..., k] * aligned[1][..., k]).amax(-1).maximum(total.abs() + error)
        error = error + (machine.block + 1) * 2.0**-machine.fraction * most.clamp(min=SINGLE.smallest_normal)
        total = total + (left[..., k] * right[..., k]).sum(-1)
        error = error + SINGLE.eps * (total.abs() + error) + SINGLE.smallest_normal * SINGLE.eps
    return error
