"""A dense product that the device takes or leaves: the library's products cannot wait for a decision made there."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .heads import operand
from .launch import Config, architecture, descriptor_fits, multiprocessors, precision_of
from .primitives import grouped, load_tile, multiply_add, wide

__all__ = ["multiply_where"]


@triton.jit
def product_kernel(
    out,  # (R, D) fp32
    left,  # (R, K), or (K, R) where TRANSPOSED: descriptor or pointer
    low,  # as left, what its rounding lost; or unused
    right,  # (K, D): descriptor or pointer
    active,  # () int32: 0 where nothing is to be done
    shape,  # (R, K, D)
    stride_left,
    stride_right,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    GROUP: tl.constexpr,
    FLAGS: tl.constexpr,  # (transposed, low, add to what is there)
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):
    rows, depth, d = shape
    units = tl.where(tl.load(active) != 0, tl.cdiv(rows, M) * tl.cdiv(d, N), 0)
    for unit in range(tl.program_id(0), units, tl.num_programs(0)):
        i, j = grouped(unit, tl.cdiv(rows, M), tl.cdiv(d, N), GROUP)
        acc = tl.zeros((M, N), tl.float32)
        for k in range(0, depth, K):
            b = load_tile(right, stride_right, k, j * N, depth, d, K, N, TMA)
            if FLAGS[0]:
                acc = multiply_add(load_tile(left, stride_left, k, i * M, depth, rows, K, M, TMA).T, b, acc, PRECISION)
                if FLAGS[1]:
                    part = load_tile(low, stride_left, k, i * M, depth, rows, K, M, TMA).T
                    acc = multiply_add(part, b, acc, PRECISION)
            else:
                acc = multiply_add(load_tile(left, stride_left, i * M, k, rows, depth, M, K, TMA), b, acc, PRECISION)
                if FLAGS[1]:
                    part = load_tile(low, stride_left, i * M, k, rows, depth, M, K, TMA)
                    acc = multiply_add(part, b, acc, PRECISION)
        row, column = i * M + tl.arange(0, M), j * N + tl.arange(0, N)
        at = out + wide(d) * row[:, None] + column[None, :]
        mask = (row < rows)[:, None] & (column < d)[None, :]
        if FLAGS[2]:
            acc += tl.load(at, mask=mask, other=0.0)
        tl.store(at, acc, mask=mask)


def multiply_where(
    out: Tensor,  # (R, D) fp32, contiguous
    left: Tensor,  # (R, K), or (K, R) where transposed
    low: Tensor | None,  # as left
    right: Tensor,  # (K, D)
    transposed: bool,
    add: bool,
    active: Tensor,  # () int32
) -> None:
    """out = (left + low) right, or += where `add`, with fp32 accumulation; nothing where `active` is 0."""
    (rows, d), depth = out.shape, right.shape[0]
    wider = left.element_size() == 4
    if left.device.type != "cuda":
        config = Config(16, 32, 16, 4, 1, group=2)
    elif architecture(left.device) == "sm_80":
        config = Config(64, 64, 32, 4, 2) if wider else Config(128, 128, 32, 8, 3)
    else:
        config = Config(64, 64, 32, 4, 3) if wider else Config(128, 128, 64, 8, 3)
    m, n, k = config.m, config.n, config.k
    tma = descriptor_fits(left) and descriptor_fits(right)
    block = [k, m] if transposed else [m, k]
    units = triton.cdiv(rows, m) * triton.cdiv(d, n)
    product_kernel[(min(units, multiprocessors(left.device)),)](
        out,
        operand(left, block, tma),
        operand(left if low is None else low, block, tma),
        operand(right, [k, n], tma),
        active,
        (rows, depth, d),
        tuple(left.stride()),
        tuple(right.stride()),
        M=m,
        N=n,
        K=k,
        GROUP=config.group,
        FLAGS=(transposed, low is not None, add),
        TMA=tma,
        PRECISION=precision_of(right),
        num_warps=config.warps,
        num_stages=config.stages,
    )
