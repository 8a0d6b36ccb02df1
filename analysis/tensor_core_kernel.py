"""The one kernel of `tensor_core_tiles`: out = acc + a b for many small tiles, by one tl.dot a program."""

from __future__ import annotations

import re

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["VERSION", "multiply"]

VERSION = triton.__version__
INSTRUCTION = re.compile(r"(wgmma\.mma_async[\w.]*|mma\.sync[\w.]*)")


@triton.jit
def _multiply(
    a,  # (T, ROWS, DEPTH)
    b,  # (T, COLUMNS, DEPTH)
    acc,  # (T, ROWS, COLUMNS) fp32
    out,  # (T, ROWS, COLUMNS) fp32
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    tile = tl.program_id(0)
    i, j, k = tl.arange(0, ROWS), tl.arange(0, COLUMNS), tl.arange(0, DEPTH)
    left = tl.load(a + tile * ROWS * DEPTH + i[:, None] * DEPTH + k[None, :])
    right = tl.load(b + tile * COLUMNS * DEPTH + j[None, :] * DEPTH + k[:, None])
    place = tile * ROWS * COLUMNS + i[:, None] * COLUMNS + j[None, :]
    result = tl.dot(left, right, tl.load(acc + place), input_precision="tf32")
    tl.store(out + place, result)


def multiply(a: Tensor, b: Tensor, acc: Tensor) -> tuple[Tensor, str]:
    """acc + a b^T of tiles (T, R, K), (T, C, K), (T, R, C) fp32 on tensor cores, and the instructions that did it."""
    out = torch.empty_like(acc)
    shape = (a.shape[1], b.shape[1], a.shape[2])
    compiled = _multiply[(len(a),)](a.contiguous(), b.contiguous(), acc.contiguous(), out, *shape, num_warps=4)
    assembly = getattr(compiled, "asm", {}).get("ptx", "")  # none in the interpreter
    return out, ", ".join(sorted(set(INSTRUCTION.findall(assembly)))) or "none"
