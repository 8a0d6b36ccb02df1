"""The surviving-tile products of tile_filter.py for Hopper (sm_90), warp-specialised like hopper.py.

While one consumer rounds a contribution into its running sum, the other multiplies. Same order, same roundings.
"""

from __future__ import annotations

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

from .entry import entry
from .hopper import barriers, describe, specialize

OWN = gl.constexpr(128)  # rows of the output that one program owns
STEP = gl.constexpr(128)  # rows of one walked tile
HALF = gl.constexpr(64)


@gluon.jit
def copy_survivors(
    dz,
    other,
    left,
    right,
    full,
    free,
    places,
    counts,
    walked,
    owner,
    first,
    TRANSPOSED: gl.constexpr,
    STAGES: gl.constexpr,
):
    """The producer: of each surviving tile two steps of 64, dZ in two halves of 64 rows of the output."""
    step = 0
    for i in range(gl.load(counts + owner)):
        walk = gl.load(places + owner * walked + i) * STEP
        for part in gl.static_range(2):
            stage = step % STAGES
            at = walk + part * HALF
            mbarrier.wait(free.index(stage), ((step // STAGES) & 1) ^ 1)
            mbarrier.expect(full.index(stage), 2 * dz.block_type.nbytes + other.block_type.nbytes)
            for which in gl.static_range(2):
                row = owner * OWN + which * HALF
                if TRANSPOSED:
                    tma.async_copy_global_to_shared(dz, [at, row], full.index(stage), left.index(stage * 2 + which))
                else:
                    tma.async_copy_global_to_shared(dz, [row, at], full.index(stage), left.index(stage * 2 + which))
            tma.async_copy_global_to_shared(other, [at, first], full.index(stage), right.index(stage))
            step += 1


@gluon.jit
def add_rounded(total, lost, value, KAHAN: gl.constexpr):
    """One contribution, read-modify-write in the dtype of the sum, or into a compensated pair of it
    (primitives.kahan_add).
    """
    if KAHAN:
        old = total.to(gl.float32)
        value = value - lost.to(gl.float32)
        new = (old + value).to(total.dtype)
        return new, ((new.to(gl.float32) - old) - value).to(total.dtype)
    else:
        return (total.to(gl.float32) + value).to(total.dtype), lost


@gluon.jit
def sum_survivors(
    shared,
    FEATURES: gl.constexpr,
    TRANSPOSED: gl.constexpr,
    KAHAN: gl.constexpr,
    FLAGS: gl.constexpr,
    STAGES: gl.constexpr,
    WHICH: gl.constexpr,
):
    """One consumer: 64 rows of the output."""
    left, right, full, free, counts, out, lost_sums, order, factor, shift, scale, owner, first, rows_end, d = shared
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, FEATURES, 16])
    by_row: gl.constexpr = gl.SliceLayout(1, layout)
    by_column: gl.constexpr = gl.SliceLayout(0, layout)
    rows = owner * OWN + WHICH * HALF + gl.arange(0, HALF, by_row)
    inside = rows < rows_end
    features = first + gl.arange(0, FEATURES, by_column)
    target = rows.to(gl.int64)
    if FLAGS[0]:
        target = gl.load(order + rows, mask=inside, other=0)
    mask = inside[:, None] & (features < d)[None, :]
    s = gl.load(scale)
    total = gl.zeros([HALF, FEATURES], out.dtype.element_ty, layout)
    lost = total
    if not TRANSPOSED:
        total = gl.load((out + target * d)[:, None] + features[None, :], mask=mask, other=0)
        if KAHAN:
            lost = gl.load((lost_sums + target * d)[:, None] + features[None, :], mask=mask, other=0)
    step = 0
    for _ in range(gl.load(counts + owner)):
        acc = gl.zeros([HALF, FEATURES], gl.float32, layout)
        for part in gl.static_range(2):
            stage = step % STAGES
            mbarrier.wait(full.index(stage), (step // STAGES) & 1)
            a = left.index(stage * 2 + WHICH)
            if TRANSPOSED:
                a = a.permute((1, 0))
            acc = warpgroup_mma(a, right.index(stage), acc, is_async=True)
            if part == 1:
                acc = warpgroup_mma_wait(num_outstanding=1, deps=[acc])
                mbarrier.arrive(free.index((step + STAGES - 1) % STAGES), count=1)
            step += 1
        acc = warpgroup_mma_wait(num_outstanding=0, deps=[acc])
        mbarrier.arrive(free.index((step + STAGES - 1) % STAGES), count=1)
        total, lost = add_rounded(total, lost, acc * s, KAHAN)
    if FLAGS[1]:
        w = gl.full([HALF], 1.0, gl.float32, by_row)
        if FLAGS[2]:
            w = gl.load(factor + rows, mask=inside, other=0.0)
        value = -w[:, None] * gl.load(shift + features, mask=features < d, other=0.0)[None, :]
        total, lost = add_rounded(total, lost, value * s, KAHAN)
    gl.store((out + target * d)[:, None] + features[None, :], total, mask=mask)
    if KAHAN and not TRANSPOSED:
        gl.store((lost_sums + target * d)[:, None] + features[None, :], lost, mask=mask)


@entry
@gluon.jit
def hopper_tile_product_kernel(
    dz,  # (N, W) descriptor, tiles (64, 64)
    other,  # (W, D), or (N, D) where TRANSPOSED: descriptor, tiles (64, FEATURES)
    places,  # (owners, walked) int32
    counts,  # (owners,)
    out,  # (N, D), or (V, D) where TRANSPOSED
    lost,  # as out, or unused
    order,  # (W,) or unused
    factor,  # (rows,) or unused
    shift,  # (D,) or unused
    scale,  # ()
    rows_end,
    d,
    walked,
    FEATURES: gl.constexpr,
    TRANSPOSED: gl.constexpr,
    KAHAN: gl.constexpr,
    FLAGS: gl.constexpr,  # (order, shift, factor)
    STAGES: gl.constexpr,
):
    left = gl.allocate_shared_memory(dz.dtype, [2 * STAGES, HALF, HALF], dz.layout)
    right = gl.allocate_shared_memory(other.dtype, [STAGES, HALF, FEATURES], other.layout)
    full, free = barriers(2, STAGES)
    owner = gl.program_id(0)
    first = gl.program_id(1) * FEATURES
    shared = (
        left, right, full, free, counts, out, lost, order, factor, shift, scale, owner, first, rows_end, d,
    )  # fmt: skip
    specialize(
        sum_survivors, (shared, FEATURES, TRANSPOSED, KAHAN, FLAGS, STAGES), 2, copy_survivors,
        (dz, other, left, right, full, free, places, counts, walked, owner, first, TRANSPOSED, STAGES),
    )  # fmt: skip


def launch_tile_product(
    dz: Tensor,
    other: Tensor,
    places: Tensor,
    counts: Tensor,
    out: Tensor,
    optional: tuple[Tensor, ...],  # lost, order, factor, shift
    scale: Tensor,
    flags: tuple[bool, bool, bool],
    kahan: bool,
    transposed: bool,
) -> None:
    """As tile_filter.tile_product_kernel with 128 x 128 tiles and a low-precision sum."""
    d = other.shape[1]
    features = 128 if kahan else 256
    hopper_tile_product_kernel[(counts.shape[0], (d + features - 1) // features)](
        describe(dz, 64, 64),
        describe(other, 64, features),
        places,
        counts,
        out,
        *optional,
        scale,
        dz.shape[1 if transposed else 0],
        d,
        places.shape[1],
        FEATURES=features,
        TRANSPOSED=transposed,
        KAHAN=kahan,
        FLAGS=flags,
        STAGES=4,
        num_warps=4,
    )
