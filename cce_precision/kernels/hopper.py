"""The logits kernels for Hopper (sm_90), warp-specialised: one warp copies tiles, two warpgroups multiply.

Each consumer owns half of the token rows of a tile. The two drift apart by as much as the ring of tile buffers allows,
so that one multiplies while the other takes exponentials. Same arithmetic, same order and hence the same results as the
portable kernels, which remain the reference; used where bulk copies fit and a call asks for nothing but nll and lse, or
for plain dZ.
"""

from __future__ import annotations

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._core import _unwrap_if_constexpr, builtin
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from ..problem import Problem
from .entry import Tiles, entry
from .launch import cdiv
from .primitives import decay_of, either, reference_of

LOG2E = gl.constexpr(1.4426950408889634)
BAND = gl.constexpr(64)  # rows of one consumer
CONSUMERS = gl.constexpr(2)  # of the kernels that compute logits: what they do with them takes registers
ROWS = gl.constexpr(128)  # of a tile of logits
COLUMNS = gl.constexpr(256)
DEPTH = gl.constexpr(64)  # features of one step


@gluon.jit
def place_of(unit, blocks, tiles, GROUP: gl.constexpr):
    """(row block, column tile) of a unit, row blocks in groups that share a column tile (see primitives.grouped)."""
    width = GROUP * tiles
    first = (unit // width) * GROUP
    size = gl.minimum(blocks - first, GROUP)
    place = unit % width
    return first + place % size, place // size


@builtin
def specialize(consume, arguments, consumers, copy, copied, _semantic=None, _generator=None):  # type: ignore[no-untyped-def]
    """Warpgroups 0, 1, ... run consume(*arguments, 0), consume(*arguments, 1), ..., and one more copy(*copied).

    Of the 512 registers that a multiprocessor has for the same thread of its warpgroups 24 copy, the others multiply.
    """
    consumers = _unwrap_if_constexpr(consumers)
    parts = [(consume, gl.tuple([*arguments, gl.constexpr(which)])) for which in range(consumers)]
    registers = [(504 - 24) // consumers // 8 * 8] * (consumers - 1) + [24]
    _semantic.warp_specialize([*parts, (copy, copied)], [4] * consumers, registers, _generator)


@builtin
def expect(barrier, size, _semantic=None):  # type: ignore[no-untyped-def]
    """mbarrier.expect of a size that is a constant."""
    mbarrier.expect(barrier, _unwrap_if_constexpr(size), _semantic=_semantic)


@gluon.constexpr_function
def accumulator(consumers):  # type: ignore[no-untyped-def]
    """The layout of a consumer's (64, 256) sum: ptxas takes no product of 256 columns at the 128 registers a thread
    with which four warpgroups start.
    """
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 256 if consumers == 2 else 128, 16])


@gluon.jit
def operands(e, c, STAGES: gl.constexpr):
    """The ring's tiles of token rows, by consumer, and of columns."""
    left = gl.allocate_shared_memory(e.dtype, [CONSUMERS * STAGES, BAND, DEPTH], e.layout)
    right = gl.allocate_shared_memory(c.dtype, [STAGES, COLUMNS, DEPTH], c.layout)
    return left, right


@gluon.jit
def barriers(CONSUMERS: gl.constexpr, STAGES: gl.constexpr):
    """The ring's barriers: a stage is full when its copies have arrived, and free when all consumers have read it."""
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(free.index(i), count=CONSUMERS)
    return full, free


@gluon.jit
def copy_tiles(
    e,
    c,
    left,
    right,
    full,
    free,
    first,
    last,
    step,
    fixed,
    blocks,
    tiles,
    d,
    chosen,
    CHOSEN: gl.constexpr,
    GROUP: gl.constexpr,
    STAGES: gl.constexpr,
):
    """The producer: tiles of e and c into the ring, in the order in which the consumers take them.

    Units first, first + step, ... below last; `fixed` >= 0: units are column tiles of that row block.
    """
    count = 0
    for unit in range(first, last, step):
        block, tile = place_of(unit, blocks, tiles, GROUP)
        if fixed >= 0:
            block = fixed
            tile = unit
        if CHOSEN:
            code = gl.load(chosen + 1 + unit)
            block, tile = code // tiles, code % tiles
        for k in range(0, d, DEPTH):
            stage = count % STAGES
            mbarrier.wait(free.index(stage), ((count // STAGES) & 1) ^ 1)
            expect(full.index(stage), CONSUMERS * e.block_type.nbytes + c.block_type.nbytes)
            for which in gl.static_range(CONSUMERS):
                row = (block * CONSUMERS + which) * BAND
                tma.async_copy_global_to_shared(e, [row, k], full.index(stage), left.index(stage * CONSUMERS + which))
            tma.async_copy_global_to_shared(c, [tile * COLUMNS, k], full.index(stage), right.index(stage))
            count += 1


@gluon.jit
def logits_band(left, right, full, free, count, d, STAGES: gl.constexpr, WHICH: gl.constexpr):
    """One consumer's (64, 256) logits in fp32, and the steps taken so far."""
    acc = gl.zeros([BAND, COLUMNS], gl.float32, accumulator(CONSUMERS))
    for k in range(0, d, DEPTH):
        stage = count % STAGES
        mbarrier.wait(full.index(stage), (count // STAGES) & 1)
        a = left.index(stage * CONSUMERS + WHICH)
        b = right.index(stage).permute((1, 0))
        acc = warpgroup_mma(a, b, acc, is_async=True)
        acc = warpgroup_mma_wait(num_outstanding=1, deps=[acc])
        mbarrier.arrive(free.index((count + STAGES - 1) % STAGES), count=1, pred=k > 0)
        count += 1
    acc = warpgroup_mma_wait(num_outstanding=0, deps=[acc])
    mbarrier.arrive(free.index((count + STAGES - 1) % STAGES), count=1)
    return acc, count


@gluon.jit
def tanh(y):
    """primitives.tanh."""
    a = gl.abs(y)
    y2 = y * y
    series = -0.053045479973 + y2 * 0.017241460416
    series = -0.33333143888 + y2 * (0.133258787567 + y2 * series)
    q = gl.exp2(a * (-2 * LOG2E))
    inverse = gl.inline_asm_elementwise(
        "rcp.approx.ftz.f32 $0, $1;", "=f,f", [1.0 + q], dtype=gl.float32, is_pure=True, pack=1
    )
    large = 1.0 - 2.0 * q * inverse
    return gl.where(a < 0.5, y + y * (y2 * series), gl.where(y < 0, -large, large))


@gluon.jit
def halves(x):
    """The left and the right half of the columns of x."""
    return gl.split(gl.permute(gl.reshape(x, [x.shape[0], 2, x.shape[1] // 2]), (0, 2, 1)))


@gluon.jit
def without_target(acc, target, bias, target_logit, rows, tile, v, softcap, FLAGS: gl.constexpr, layout: gl.constexpr):
    """The logits (64, 256) of a tile, -inf at the targets, whose own are stored, and beyond the vocabulary; which rows
    have their target there, and where. FLAGS: (bias, softcap, ...).
    """
    z = acc
    local = target - tile * COLUMNS
    hit = (local >= 0) & (local < COLUMNS)
    columns = gl.arange(0, COLUMNS, gl.SliceLayout(0, layout))
    if FLAGS[0]:
        at = tile * COLUMNS + columns
        z += gl.load(bias + at, mask=at < v, other=0.0).to(gl.float32)[None, :]
    if FLAGS[1]:
        z = softcap * tanh(z * (1.0 / softcap))
    if tile * COLUMNS + COLUMNS > v:
        z = gl.where((columns < v - tile * COLUMNS)[None, :], z, float("-inf"))
    if gl.max(hit.to(gl.int32), 0) > 0:  # few tiles hold a target
        own = columns[None, :] == local[:, None]
        gl.store(target_logit + rows, gl.sum(gl.where(own, z, 0.0), 1), mask=hit)
        z = gl.where(own, float("-inf"), z)
    return z, hit, local


@gluon.jit
def online_softmax_update(m, s, z, highest, scale):
    """primitives.online_softmax_update of a tile whose row maxima are `highest`: m, s, the reference, the exponents
    below it, and their powers.
    """
    top = gl.maximum(m, highest)
    reference = reference_of(top, scale)
    below = z * scale - reference[:, None]
    p = gl.exp2(below)
    return top, decay_of(m, top, scale) * s + gl.sum(p, 1), reference, below, p


@gluon.jit
def store_partial(partial, m, s, rows, inside, split, splits, n):
    """The running maximum and sum of a split into (2, splits, N)."""
    out = partial + split.to(gl.int64) * n + rows
    gl.store(out, m, mask=inside)
    gl.store(out + gl.to_tensor(splits).to(gl.int64) * n, s, mask=inside)


@gluon.jit
def softmax_band(shared, FLAGS: gl.constexpr, STAGES: gl.constexpr, WHICH: gl.constexpr):
    """One consumer of the forward pass: running maximum and sum of its rows over column tiles first to last."""
    (
        left, right, full, free, targets, bias, partial, target_logit, bounds, record, block, split, first,
        last, n, v, d, splits, scale, softcap, threshold,
    ) = shared  # fmt: skip
    layout: gl.constexpr = accumulator(CONSUMERS)
    by_row: gl.constexpr = gl.SliceLayout(1, layout)
    by_column: gl.constexpr = gl.SliceLayout(0, layout)
    first_row = (block * CONSUMERS + WHICH) * BAND
    rows = first_row + gl.arange(0, BAND, by_row)
    inside = rows < n
    target = gl.load(targets + rows, mask=inside, other=-1).to(gl.int32)
    m = gl.full([BAND], float("-inf"), gl.float32, by_row)
    s = gl.zeros([BAND], gl.float32, by_row)
    count = 0
    lowest = m
    for tile in range(first, last):
        if FLAGS[2]:
            lowest = gl.load(bounds + rows, mask=inside, other=float("inf"), volatile=True)
        acc, count = logits_band(left, right, full, free, count, d, STAGES, WHICH)
        z, hit, local = without_target(acc, target, bias, target_logit, rows, tile, v, softcap, FLAGS, layout)
        columns = gl.arange(0, COLUMNS, by_column)
        highest = gl.max(z, 1)
        m, s, reference, below, _ = online_softmax_update(m, s, z, highest, scale)
        if FLAGS[2]:
            known = m * scale + gl.log2(s)
            gl.atomic_max(bounds + rows, known, mask=inside & (known > lowest + 0.25))
            keep_from = gl.maximum(lowest, known) + threshold
            if gl.max((highest * scale >= keep_from).to(gl.int32), 0) > 0:
                found = gl.where(below < (keep_from - reference)[:, None], 0, 1 << (columns // 8)[None, :])
                words = gl.reduce(gl.reduce(gl.reshape(found, [BAND, COLUMNS // 8, 8]), 1, either), 0, either)
                place = gl.arange(0, 8, words.type.layout)
                out = record + gl.to_tensor(first_row // 128).to(gl.int64) * ((v + 255) // 256 * 8) + tile * 8 + place
                gl.atomic_or(out, words, mask=words != 0)
    store_partial(partial, m, s, rows, inside, split, splits, n)


@entry
@gluon.jit
def hopper_forward_kernel(
    e,  # (N, D) descriptor, tiles (64, 64)
    c,  # (V, D) descriptor, tiles (256, 64)
    targets,  # (N,) int64
    bias,  # (V,) or unused
    partial,  # (2, splits, N) fp32
    target_logit,  # (N,) fp32
    bounds,  # (N,) fp32 lower bounds of the lse in base 2, raised by the walk; or unused
    record,  # (row blocks, words) int32 zeros, see record.py; or unused
    n,
    v,
    d,
    splits,
    tiles_a_split,
    scale,
    softcap,
    threshold,
    FLAGS: gl.constexpr,  # (bias, softcap, record)
    GROUP: gl.constexpr,
    STAGES: gl.constexpr,
):
    left, right = operands(e, c, STAGES)
    full, free = barriers(CONSUMERS, STAGES)
    block, split = place_of(gl.program_id(0), (n + ROWS - 1) // ROWS, splits, GROUP)
    first = split * tiles_a_split
    last = gl.minimum(first + tiles_a_split, (v + COLUMNS - 1) // COLUMNS)
    one = gl.to_tensor(1)
    shared = (
        left, right, full, free, targets, bias, partial, target_logit, bounds, record, block, split, first,
        last, n, v, d, splits, scale, softcap, threshold,
    )  # fmt: skip
    specialize(
        softmax_band, (shared, FLAGS, STAGES), CONSUMERS, copy_tiles,
        (
            e, c, left, right, full, free, first, last, one, block, one, one, d, targets, gl.constexpr(False), GROUP,
            STAGES,
        ),
    )  # fmt: skip


_LAYOUT = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)


def describe(x: Tensor, rows: int, columns: int) -> Tiles:
    """A 16-bit matrix for the bulk copy engine."""
    return Tiles(x, (rows, columns), _LAYOUT)


def launch_forward(
    problem: Problem,
    outputs: tuple[Tensor, Tensor, Tensor, Tensor],
    tiles_a_split: int,
    scale: float,
    threshold: float,
    group: int,
) -> None:
    """Fills outputs (partial, target_logit, bounds, record) as heads.forward_kernel does; an empty record is unused."""
    partial, target_logit, bounds, record = outputs
    splits, n = partial.shape[1:]
    hopper_forward_kernel[(cdiv(n, 128) * splits,)](
        describe(problem.e, 64, 64),
        describe(problem.c, 256, 64),
        problem.targets,
        partial if problem.bias is None else problem.bias,
        partial,
        target_logit,
        bounds,
        record if record.numel() else problem.targets,
        n,
        problem.v,
        problem.d,
        splits,
        tiles_a_split,
        scale,
        float(problem.softcap or 1.0),
        threshold,
        FLAGS=(problem.bias is not None, problem.softcap is not None, record.numel() > 0),
        GROUP=group,
        STAGES=4,
        num_warps=4,
    )
