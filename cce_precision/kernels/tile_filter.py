"""Products over the surviving tiles of dZ, summed as `Accumulation` says. Deterministic: one program owns its output
tile.

The tile filter skips a tile of dZ where every |P - onehot| stays below eps (Wijmans et al., arXiv 2411.09009). dz.py
decides with the final lse; here each row block (for dE) or column tile (for dC) walks its survivors in order. So a
read-modify-write in the input dtype, or a compensated pair of it, happens in registers with the very roundings that the
record names.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..numerics import Accumulation
from .dz import TileFilter
from .entry import entry
from .heads import operand
from .launch import cdiv, descriptor_fits, hopper_fits, next_power_of_2, precision_of
from .primitives import kahan_add, load_tile, multiply_add, round_to

__all__ = ["survivors", "tile_product"]

_MODES = {Accumulation.FP32: 0, Accumulation.INPUT: 1, Accumulation.KAHAN: 2}


@entry
@triton.jit
def survivors_kernel(
    alive,  # (owners, walked) int32, by strides: survives where >= least
    places,  # (owners, walked) int32
    counts,  # (owners,) int32
    walked,
    least,
    stride_owner,
    stride_walked,
    WALKED: tl.constexpr,
):
    owner = tl.program_id(0)
    place = tl.arange(0, WALKED)
    value = tl.load(alive + owner * stride_owner + place * stride_walked, mask=place < walked, other=-1)
    flag = (value >= least).to(tl.int32)
    rank = tl.cumsum(flag, 0) - flag
    tl.store(places + owner * walked + rank, place, mask=(place < walked) & (flag != 0))
    tl.store(counts + owner, tl.sum(flag, 0))


def survivors(alive: Tensor, least: int) -> tuple[Tensor, Tensor]:
    """(places, counts): for each row of alive (owners, walked), the places of entries >= least in rising order, and how
    many.
    """
    owners, walked = alive.shape
    places = torch.empty((owners, walked), dtype=torch.int32, device=alive.device)
    counts = torch.empty(owners, dtype=torch.int32, device=alive.device)
    most = next_power_of_2(walked)
    survivors_kernel[(owners,)](alive, places, counts, walked, least, *alive.stride(), WALKED=most)
    return places, counts


@triton.jit
def add_contribution(total, lost, value, scale, MODE: tl.constexpr, DTYPE: tl.constexpr):
    """One contribution (fp32, unscaled) into the running sum, in the roundings of MODE (0 fp32, 1 input dtype, 2 Kahan
    pair).
    """
    if MODE == 0:
        return total + value, lost
    elif MODE == 1:
        return round_to(total.to(tl.float32) + value * scale, DTYPE), lost
    else:
        return kahan_add(total, lost, value * scale, DTYPE)


@entry
@triton.jit
def tile_product_kernel(
    dz,  # (N, W) descriptor or pointer
    other,  # (W, D) columns of the classifier, or (N, D) embeddings where TRANSPOSED: descriptor or pointer
    places,  # (owners, walked) int32
    counts,  # (owners,)
    out,  # (N, D) running sums of dE, or (V, D) where TRANSPOSED
    lost,  # as out, the second half of a Kahan pair carried from run to run, or unused
    order,  # (W,) row of out for each column of this run, or unused
    factor,  # (rows,) fp32: minus factor x shift is one more contribution, or unused
    shift,  # (D,) fp32, or unused
    scale,  # () fp32
    shape,  # (N, W, D)
    stride_dz,
    stride_other,
    walked,
    TM: tl.constexpr,
    TN: tl.constexpr,
    FEATURES: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    MODE: tl.constexpr,
    FLAGS: tl.constexpr,  # (order, shift, factor)
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):
    n, width, d = shape
    owner = tl.program_id(0)
    first = tl.program_id(1) * FEATURES
    OWN: tl.constexpr = TN if TRANSPOSED else TM
    STEP: tl.constexpr = TM if TRANSPOSED else TN
    DTYPE: tl.constexpr = out.dtype.element_ty
    SUM: tl.constexpr = tl.float32 if MODE == 0 else DTYPE
    rows = owner * OWN + tl.arange(0, OWN)
    inside = rows < (width if TRANSPOSED else n)
    features = first + tl.arange(0, FEATURES)
    s = tl.load(scale)
    target = rows.to(tl.int64)
    if FLAGS[0]:
        target = tl.load(order + rows, mask=inside, other=0)
    at = (out + target * d)[:, None] + features[None, :]
    mask = inside[:, None] & (features < d)[None, :]
    total = tl.zeros((OWN, FEATURES), SUM)
    small = tl.zeros((OWN, FEATURES), SUM)
    if not TRANSPOSED:
        total = tl.load(at, mask=mask, other=0)
        if MODE == 2:
            small = tl.load((lost + target * d)[:, None] + features[None, :], mask=mask, other=0)
    for i in range(tl.load(counts + owner)):
        walk = tl.load(places + owner * walked + i)
        right = load_tile(other, stride_other, walk * STEP, first, n if TRANSPOSED else width, d, STEP, FEATURES, TMA)
        if TRANSPOSED:
            left = load_tile(dz, stride_dz, walk * TM, owner * TN, n, width, TM, TN, TMA).T
        else:
            left = load_tile(dz, stride_dz, owner * TM, walk * TN, n, width, TM, TN, TMA)
        if MODE == 0:
            total = multiply_add(left, right, total, PRECISION)
        else:
            value = multiply_add(left, right, tl.zeros((OWN, FEATURES), tl.float32), PRECISION)
            total, small = add_contribution(total, small, value, s, MODE, DTYPE)
    if FLAGS[1]:
        w = tl.full((OWN,), 1.0, tl.float32)
        if FLAGS[2]:
            w = tl.load(factor + rows, mask=inside, other=0.0)
        value = -w[:, None] * tl.load(shift + features, mask=features < d, other=0.0)[None, :]
        total, small = add_contribution(total, small, value, s, MODE, DTYPE)
    if MODE == 0:
        if TRANSPOSED:
            tl.store(at, round_to(total * s, DTYPE), mask=mask)
        else:
            tl.store(at, total, mask=mask)
    else:
        tl.store(at, total, mask=mask)
    if MODE == 2 and not TRANSPOSED:
        tl.store((lost + target * d)[:, None] + features[None, :], small, mask=mask)


def tile_product(
    dz: Tensor,  # (N, W)
    other: Tensor,  # (W, D) where dE is summed, (N, D) where dC
    alive: Tensor,  # (row blocks, column tiles) int32, the largest |P - onehot| of each tile as fp32 bits
    tile_filter: TileFilter,
    out: Tensor,  # dE's running sums (N, D): fp32 for FP32 accumulation, else the gradient itself; or dC (V, D)
    lost: Tensor | None,  # (N, D) Kahan's second half for dE
    scale: Tensor,
    accum: Accumulation,
    transposed: bool,  # dC = dZ^T E, complete in this call, instead of dE += dZ C
    order: Tensor | None = None,  # (W,) rows of dC
    factor: Tensor | None = None,  # (rows,)
    shift: Tensor | None = None,  # (D,)
) -> None:
    """Adds the surviving tiles' products, and then minus factor x shift, to `out`."""
    n, width = dz.shape
    d = other.shape[1]
    places, counts = survivors(alive.T if transposed else alive, tile_filter.bits)
    tile = tm, tn = tile_filter.tile
    optional = tuple(places if x is None else x for x in (lost, order, factor, shift))  # any tensor where unused
    flags = (order is not None, shift is not None, factor is not None)
    tma = descriptor_fits(dz) and descriptor_fits(other)
    if tma and accum is not Accumulation.FP32 and hopper_fits(dz, tile == (128, 128)):
        from .hopper_tiles import launch_tile_product

        kahan = accum is Accumulation.KAHAN
        launch_tile_product(dz, other, places, counts, out, optional, scale, flags, kahan, transposed)
        return
    most = 64 if accum is Accumulation.KAHAN or dz.dtype is torch.float32 else 128  # what registers hold without spills
    features = min(most, max(16, next_power_of_2(d)))
    tile_product_kernel[(counts.shape[0], cdiv(d, features))](
        operand(dz, [tm, tn], tma),
        operand(other, [tm if transposed else tn, features], tma),
        places,
        counts,
        out,
        *optional,
        scale,
        (n, width, d),
        tuple(dz.stride()),
        tuple(other.stride()),
        places.shape[1],
        TM=tm,
        TN=tn,
        FEATURES=features,
        TRANSPOSED=transposed,
        MODE=_MODES[accum],
        FLAGS=flags,
        TMA=tma,
        PRECISION=precision_of(dz),
        num_warps=8 if tm * tn >= 8192 else 4,
        num_stages=3 if dz.dtype is not torch.float32 else 2,
    )
