"""dZ of a run of columns: the logits again, and from them x = P (alpha - kappa (log P + H)) in the operand's dtype.

The label's entry is 0 (its term is added apart, in fp32) or the given label term; the other conventions stand in AGENTS.md.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..problem import Problem
from .heads import operand
from .launch import Config, descriptor_fits, precision_of, tuned
from .primitives import LOG2E, cap, grouped, load_tile, multiply_add, round_to, wide
from .terms import RowTerms

__all__ = ["write_dz"]


@triton.jit
def dz_kernel(
    e,  # (N, D) descriptor or pointer, ignored rows 0
    c,  # (W, D) descriptor or pointer, this run of columns
    bias,  # (W,) or unused
    weight,  # (W,) column weights of the smooth head, or unused
    targets,  # (N,) int64 positions in visiting order, -1 where ignored
    rows_terms,  # (5, N) fp32: lse, alpha, kappa, entropy, sigma
    label,  # (N,) fp32 the label's entry of dZ: before the slope where it stands in dz, after it where apart
    dz,  # (N, W) operand dtype: descriptor or pointer
    dz_low,  # (N, W) what rounding dz lost, or unused
    column_sums,  # (row blocks, W) fp32 sums of the unrounded dZ, the label always included, or unused
    shape,  # (N, W, D)
    stride_e,
    stride_c,
    stride_dz,
    start,  # position of the first column
    softcap,
    temperature,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    GROUP: tl.constexpr,
    FLATTEN: tl.constexpr,
    FLAGS: tl.constexpr,  # (bias, softcap, entropy, smooth, weight, label, split, sums)
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
    DTYPE: tl.constexpr,
):
    n, width, d = shape
    BIAS: tl.constexpr = FLAGS[0]
    SOFTCAP: tl.constexpr = FLAGS[1]
    ENTROPY: tl.constexpr = FLAGS[2]
    SMOOTH: tl.constexpr = FLAGS[3]
    WEIGHT: tl.constexpr = FLAGS[4]
    LABEL: tl.constexpr = FLAGS[5]
    SPLIT: tl.constexpr = FLAGS[6]
    SUMS: tl.constexpr = FLAGS[7]
    blocks, tiles = tl.cdiv(n, M), tl.cdiv(width, N)
    for unit in tl.range(tl.program_id(0), blocks * tiles, tl.num_programs(0), flatten=FLATTEN):
        block, tile = grouped(unit, blocks, tiles, GROUP)
        acc = tl.zeros((M, N), tl.float32)
        for k in range(0, d, K):
            left = load_tile(e, stride_e, block * M, k, n, d, M, K, TMA)
            right = load_tile(c, stride_c, tile * N, k, width, d, N, K, TMA)
            acc = multiply_add(left, right.T, acc, PRECISION)
        rows = block * M + tl.arange(0, M)
        inside = rows < n
        columns = tile * N + tl.arange(0, N)
        if BIAS:
            acc += tl.load(bias + columns, mask=columns < width, other=0).to(tl.float32)[None, :]
        z, slope = cap(acc, softcap, SOFTCAP)
        lse = tl.load(rows_terms + rows, mask=inside, other=0.0)
        factor = tl.load(rows_terms + wide(n) + rows, mask=inside, other=0.0)[:, None]
        log_p = z * (1.0 / temperature) - lse[:, None]
        x = tl.exp2(log_p * LOG2E)
        if ENTROPY:
            kappa = tl.load(rows_terms + wide(n) * 2 + rows, mask=inside, other=0.0)
            entropy = tl.load(rows_terms + wide(n) * 3 + rows, mask=inside, other=0.0)
            factor = factor - kappa[:, None] * (tl.maximum(log_p, -3.0e38) + entropy[:, None])
        x *= factor
        local = tl.load(targets + rows, mask=inside, other=-1).to(tl.int32) - start - tile * N
        hit = (local >= 0) & (local < N)
        apart = tl.zeros((N,), tl.float32)  # column sums of the label's terms that stay out of the operand
        if tl.sum(hit.to(tl.int32)) > 0:  # few tiles hold a target
            own = (columns - tile * N)[None, :] == local[:, None]
            if LABEL:
                x = tl.where(own, tl.load(label + rows, mask=inside, other=0.0)[:, None], x)
            else:
                x = tl.where(own, 0.0, x)
                if SUMS:
                    apart = tl.sum(tl.where(own, tl.load(label + rows, mask=inside, other=0.0)[:, None], 0.0), 0)
        if SMOOTH:
            sigma = tl.load(rows_terms + wide(n) * 4 + rows, mask=inside, other=0.0)
            if WEIGHT:
                x -= sigma[:, None] * tl.load(weight + columns, mask=columns < width, other=0.0)[None, :]
            else:
                x -= sigma[:, None]
        x *= slope
        if SUMS:
            out = column_sums + wide(width) * block + columns
            tl.store(out, apart + tl.sum(tl.where(inside[:, None], x, 0.0), 0), mask=columns < width)
        high = round_to(x, DTYPE)
        if TMA:
            dz.store([block * M, tile * N], high)
        else:
            store_tile(dz, stride_dz, rows, columns, inside, columns < width, high)
        if SPLIT:
            low = round_to(x - high.to(tl.float32), DTYPE)
            if TMA:
                dz_low.store([block * M, tile * N], low)
            else:
                store_tile(dz_low, stride_dz, rows, columns, inside, columns < width, low)


@triton.jit
def store_tile(x, stride, i, j, inside_i, inside_j, value):
    place = i[:, None].to(tl.int64) * stride[0] + j[None, :].to(tl.int64) * stride[1]
    tl.store(x + place, value, mask=inside_i[:, None] & inside_j[None, :])


@functools.lru_cache(maxsize=None)
def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def write_dz(
    problem: Problem,
    e: Tensor,  # (N, D) contiguous, ignored rows 0
    c: Tensor,  # (W, D) this run of columns
    start: int,
    terms: RowTerms,
    dz: Tensor,  # (N, W)
    dz_low: Tensor | None,  # (N, W)
    bias: Tensor | None,  # (W,)
    weight: Tensor | None,  # (W,)
    want_sums: bool,
) -> Tensor | None:
    """Fills dz (and dz_low); returns the column sums (W,) of the unrounded dZ if wanted."""
    rows = e.shape[0]
    config = tuned("dz", c, lambda candidate: _launch(problem, e, c, start, terms, dz, dz_low, bias, weight, None, candidate))
    sums = None
    if want_sums:
        sums = torch.empty((triton.cdiv(rows, config.m), c.shape[0]), dtype=torch.float32, device=e.device)
    _launch(problem, e, c, start, terms, dz, dz_low, bias, weight, sums, config)
    return None if sums is None else sums.sum(0)


def _launch(
    problem: Problem,
    e: Tensor,
    c: Tensor,
    start: int,
    terms: RowTerms,
    dz: Tensor,
    dz_low: Tensor | None,
    bias: Tensor | None,
    weight: Tensor | None,
    sums: Tensor | None,
    config: Config,
) -> None:
    rows, width = e.shape[0], c.shape[0]
    tma = descriptor_fits(e) and descriptor_fits(c) and descriptor_fits(dz)
    tile = [config.m, config.n]
    weighted = terms.smooth_inside and weight is not None
    flags = (
        bias is not None,
        problem.softcap is not None,
        terms.entropy,
        terms.smooth_inside,
        weighted,
        terms.label_inside,
        dz_low is not None,
        sums is not None,
    )
    units = triton.cdiv(rows, config.m) * triton.cdiv(width, config.n)
    unused = terms.terms
    dz_kernel[(min(units, multiprocessors(e.device)),)](
        operand(e, [config.m, config.k], tma),
        operand(c, [config.n, config.k], tma),
        bias if bias is not None else unused,
        weight if weighted else unused,
        terms.targets,
        terms.terms,
        terms.label,
        operand(dz, tile, tma),
        operand(dz if dz_low is None else dz_low, tile, tma),
        unused if sums is None else sums,
        (rows, width, problem.d),
        tuple(e.stride()),
        tuple(c.stride()),
        tuple(dz.stride()),
        start,
        float(problem.softcap or 1.0),
        float(problem.temperature),
        M=config.m,
        N=config.n,
        K=config.k,
        GROUP=config.group,
        FLATTEN=config.flatten,
        FLAGS=flags,
        TMA=tma,
        PRECISION=precision_of(c),
        DTYPE={torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}[dz.dtype],
        num_warps=config.warps,
        num_stages=config.stages,
    )
